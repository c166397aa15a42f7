// Packets to pictures on the GPU: the driver's parser and one of its hardware decoders behind the Decoder interface.
#pragma once

extern "C" {
#include <libavcodec/bsf.h>
}

#include <map>
#include <memory>
#include <vector>

#include "decoder.h"
#include "index.h"
#include "nvdec_engine.h"

namespace video {

// Everything that keeps a picture from being exact, and everything that the driver refuses, ends in kUnsupported: the
// processor is to decode the file instead.
class NvdecDecoder final : public Decoder {
public:
    // All of these must outlive the decoder, and the GPU be current for the calling thread.
    static Status open(const AVStream* stream, const Index& index, const Watch& watch, const NvdecDriver& driver,
                       NvdecEngine* engine, std::unique_ptr<Decoder>* decoder);
    ~NvdecDecoder() override;

    // The frames handed to `take` have no pixels: their `opaque` is the NvdecPicture to copy, good until `take` returns.
    bool decode(const AVPacket* packet, const Take& take, Status* status) override;
    void reset() override;

private:
    struct FreeFilter {
        void operator()(AVBSFContext* filter) const { av_bsf_free(&filter); }
    };

    NvdecDecoder(const Index& index, const Watch& watch, const NvdecDriver& driver, NvdecEngine* engine)
        : index_(index), watch_(watch), driver_(driver), engine_(*engine) {}

    Status open_filter(const AVCodecParameters* codec);
    Status open_parser();
    Status parse(const AVPacket* packet);
    Status feed(CUVIDSOURCEDATAPACKET* packet);
    // Whether a picture is shown before the one that decoding started from.
    bool is_leading(int32_t packet) const;

    // What the parser calls back, from within cuvidParseVideoData; 0 makes it stop.
    int on_sequence(const CUVIDEOFORMAT& format);
    int on_decode(CUVIDPICPARAMS* picture);
    int on_display(const CUVIDPARSERDISPINFO& shown);
    Status prepare(const CUVIDEOFORMAT& format);
    // Waits for the picture that was last decoded into a surface; not ok if the decoder found an error in it.
    Status settle(int surface);

    const Index& index_;
    const Watch& watch_;
    const NvdecDriver& driver_;
    NvdecEngine& engine_;
    cudaVideoCodec codec_ = cudaVideoCodec_NumCodecs;
    std::unique_ptr<AVBSFContext, FreeFilter> filter_;  // to start codes, where the container has lengths
    std::vector<uint8_t> header_;                       // parameter sets that the container keeps apart
    std::vector<uint8_t> joined_;                       // header_ and the first packet after it
    PacketPtr filtered_;
    FramePtr frame_;
    CUvideoparser parser_ = nullptr;
    CUVIDEOFORMAT format_ = {};
    bool has_format_ = false;
    int32_t first_packet_ = -1;         // since the last reset
    int32_t packet_ = -1;               // in the parser now
    std::map<int, int32_t> in_flight_;  // surface -> packet of the picture that was last decoded into it
    const Take* take_ = nullptr;
    Status status_;  // of the call in progress
};

}  // namespace video
