// All packets of a video, read once: which frames there are, when they are shown and what is needed to decode them.
#pragma once

#include <ctime>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bitstream.h"
#include "demuxer.h"

namespace video {

struct IndexedPacket {
    int64_t pts;
    int64_t dts;
    int64_t duration;
    int64_t byte_position;
    int32_t size;
    ReferenceUse use;  // of packets that come after one another
    bool is_key;
    bool is_shown;      // decodes to a frame of the presentation: not cut by an edit list, not hidden
    bool is_cut;        // data is missing in it, right before it or right after it
    bool is_second_field;  // completes the frame of the packet before
    bool is_decodable_leading;  // shown before the key that it follows, without a need for what is before that

    static constexpr int64_t kNone = AV_NOPTS_VALUE;

    bool is_droppable() const { return use.writes == 0; }  // no other frame needs it
};

// How a coded picture is turned for display: transposed first, then mirrored.
struct Orientation {
    bool transpose = false;
    bool mirror_x = false;
    bool mirror_y = false;

    bool is_identity() const { return !transpose && !mirror_x && !mirror_y; }
};

// When a frame is shown, in ticks of a clock that runs through the whole file.
struct ShownTime {
    int64_t begin;
    int64_t duration;
};

struct Index {
    std::string path;
    std::string format;
    std::string codec;
    int64_t file_size = 0;
    int64_t modified_ns = 0;
    int width = 0;  // coded; display size follows `orientation`
    int height = 0;
    Orientation orientation;
    int unapplied_degrees = 0;  // of a rotation that is no quarter turn
    int clock_bits = 64;        // after which the clock of the container wraps
    int decoder_delay = 0;      // packets that go into a decoder before the first frame comes out
    AVRational time_base = {0, 1};
    AVRational frame_rate = {0, 1};  // as the header gives it; 0/1 where it does not
    bool has_false_times = false;    // pts are in the order of decoding where the pictures' own order is another
    bool has_times = false;          // every packet has its own, true pts; else frames are known by counting them
    bool is_truncated = false;       // the container promises more than could be read
    double read_s = 0.0;             // seconds that reading it took
    std::string trouble;             // what went wrong while reading, if anything

    std::vector<IndexedPacket> packets;  // in decoding order
    std::vector<int32_t> shown;          // packet of each frame, in order of presentation
    std::vector<int32_t> keys;           // packets that decoding can start from, ascending
    std::vector<ShownTime> shown_times;  // of `shown` with has_times, else ascending; empty where packets have none
    int num_left_out = 0;  // frames that are not in `shown`: they need what was before the file, or before a part of it
    int reorder_depth = 0;               // packets that may come before one that is shown earlier

    // The one packet with this pts, or -1.
    int32_t find(int64_t pts) const;
    // The packet of the index that `packet` is, or -1; `expected`: where it is if nothing was passed over, or -1.
    int32_t find(const AVPacket& packet, int32_t expected) const;
    // Its pts on the clock that runs through the whole file.
    int64_t time_of(int32_t packet) const;
    // How often the clock starts again.
    int num_restarts() const { return parts_.empty() ? 0 : static_cast<int>(parts_.size()) - 1; }
    // Index into `keys` of the last key that `packet` can be decoded from.
    int key_before(int32_t packet) const;
    // The last packet of the frame that `packet` starts.
    int32_t last_packet_of(int32_t packet) const;
    // Whether something that `packet` needs was lost before any decoder saw it.
    bool is_spoiled(int32_t packet) const;

    // Fills `has_times` and what the other functions look up from `packets`.
    void arrange();

private:
    // Packets of one clock: as of a file that others were joined to.
    struct Part {
        int32_t first;
        int64_t shift = 0;  // of its clock, in ticks
    };

    void find_parts();
    void find_lost();
    void sort_shown();
    void join_clocks();
    void delay(std::vector<ShownTime>* times) const;
    int64_t raw_time(int32_t packet) const { return has_any_pts_ ? packets[packet].pts : packets[packet].dts; }
    size_t part_of(int32_t packet) const;
    std::pair<const int32_t*, const int32_t*> with_pts(int64_t pts) const;

    std::vector<int32_t> by_pts_;
    std::vector<int32_t> cuts_;
    std::vector<Part> parts_;
    std::vector<bool> is_lost_;  // packets that no frame can be made of
    bool has_any_pts_ = false;
};

struct IndexResult {
    Status status;
    std::shared_ptr<const Index> index;  // null unless the status is ok
};

int64_t nanoseconds(const timespec& time);

// Not ok for an index of a file that may not be decoded.
Status check(const Index& index, const Limits& limits);

IndexResult read_index(const std::string& path, const Limits& limits, const Watch& watch);

}  // namespace video
