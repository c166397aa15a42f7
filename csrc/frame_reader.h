// Decodes chosen frames of an indexed file, and makes sure that they are the chosen ones.
#pragma once

#include <functional>
#include <vector>

#include "decoder.h"
#include "index.h"

namespace video {

enum class FrameState : uint8_t { kMissing, kGood, kDamaged };

struct ReadCounts {
    int64_t decoded = 0;  // packets
    int64_t dropped = 0;  // packets that no wanted frame needs
    int64_t seeks = 0;
    int64_t back_offs = 0;  // starts from an earlier key because a frame did not come out whole
};

class FrameReader {
public:
    // Called with the place of a frame in the list of wanted ones; for the same place again if it came out better.
    using Take = std::function<Status(const AVFrame&, size_t place)>;

    FrameReader(const Index& index, const Limits& limits, const Watch& watch,
                OpenDecoder open_decoder = open_software_decoder)
        : index_(index), limits_(limits), watch_(watch), open_decoder_(std::move(open_decoder)) {}

    // `frames`: places in order of presentation, ascending, no two equal. `states` gets one entry per frame, also when
    // the status is not ok.
    Status read(const std::vector<int32_t>& frames, const Take& take, std::vector<FrameState>* states);

    const ReadCounts& counts() const { return counts_; }

private:
    // Wanted frames [begin, end) of `wanted_`, decoded from the same key.
    struct Run {
        int key;
        size_t begin;
        size_t end;
    };
    struct Wanted {
        int32_t packet;
        size_t place;
    };

    Status open();
    std::vector<Run> plan() const;
    Status count_frames(const std::vector<int32_t>& frames);
    Status read_run(const Run& run, int key);
    Status retry(const Run& run);
    bool is_whole(const Run& run) const;
    const Wanted* find_wanted(int64_t packet) const;
    // Of the packets [first, last], those that a wanted frame among them needs.
    std::vector<bool> find_needed(int32_t first, int32_t last) const;
    void mark_damage(const Run& run);

    // Makes `target` the next packet that is read.
    Status move_to(int32_t target);
    Status read_packet();
    bool try_seek(int32_t key);

    const Index& index_;
    const Limits& limits_;
    const Watch& watch_;
    OpenDecoder open_decoder_;
    std::unique_ptr<Demuxer> demuxer_;
    std::unique_ptr<Decoder> decoder_;
    PacketPtr packet_;
    int64_t current_ = -1;  // index of packet_, -1: not one of the index
    int32_t expected_ = 0;  // index of the next packet, -1: not known
    bool is_pending_ = false;
    bool at_end_ = false;

    std::vector<Wanted> wanted_;  // by packet
    std::vector<int32_t> broken_;  // packets that failed in this run
    bool is_out_of_order_ = false;  // frames come out in another order than their times say
    const Take* take_ = nullptr;
    std::vector<FrameState>* states_ = nullptr;
    ReadCounts counts_;
};

}  // namespace video
