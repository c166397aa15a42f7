// What a coded packet says about itself without being decoded.
#pragma once

#include "ffmpeg.h"

namespace video {

enum class Reference : uint8_t {
    kUnknown,  // treat as needed
    kNeeded,
    kUnused,  // no other picture of its temporal layer refers to it
};

struct PacketTraits {
    Reference reference = Reference::kUnknown;
    uint8_t temporal_id = 0;
    bool hidden = false;  // decodes to no picture of its own
    bool is_entry = true;  // decoding may start here, as far as the bits tell
};

class BitstreamReader {
public:
    explicit BitstreamReader(const AVCodecParameters* codec);

    PacketTraits read(const uint8_t* data, int size);
    // False once the stream showed layers, views or fields, where a picture's flags do not tell who refers to it.
    bool can_drop() const { return can_drop_; }

private:
    void read_nal(const uint8_t* data, int size, PacketTraits* traits);
    void read_h264_nal(const uint8_t* data, int size, PacketTraits* traits);
    void read_hevc_nal(const uint8_t* data, int size, PacketTraits* traits);

    bool knows_entries() const { return codec_id_ == AV_CODEC_ID_H264 || codec_id_ == AV_CODEC_ID_HEVC; }

    AVCodecID codec_id_;
    int length_size_ = 0;  // 0: start codes
    bool can_drop_ = false;
};

}  // namespace video
