// H.264 and HEVC whose parameter sets and messages are packets of their own: each becomes part of the next picture's.
#pragma once

#include <vector>

#include "ffmpeg.h"

namespace video {

class HeaderJoiner {
public:
    explicit HeaderJoiner(const AVCodecParameters& codec);

    // Whether `packet` holds no picture, and waits for the next one.
    bool hold(const AVPacket& packet);
    // Puts what waits before the picture of `packet`, which begins where that did: 0 or an FFmpeg error.
    int join(AVPacket* packet);
    // Forgets what waits, for a packet from elsewhere.
    void reset() { held_.clear(); }

    int num_held() const { return num_held_; }  // packets so far

private:
    bool is_header(const uint8_t* unit, int size) const;

    AVCodecID codec_id_;
    int length_bytes_;
    std::vector<uint8_t> held_;
    int64_t dts_ = AV_NOPTS_VALUE;  // of the first that waits
    int64_t byte_position_ = -1;
    int flags_ = 0;
    int num_held_ = 0;
};

}  // namespace video
