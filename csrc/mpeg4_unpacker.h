// DivX and XviD hide B-frames of MPEG-4 behind the frame before, and leave a packet without a picture in their place.
#pragma once

#include <cstdint>
#include <vector>

#include "picture_type.h"

namespace video {

// Gives every packet one frame again.
class Mpeg4Unpacker {
public:
    explicit Mpeg4Unpacker(const AVCodecParameters* codec) : types_(codec) {}

    // Of a packet with more than one frame, keeps all but the first for the packets that follow.
    // Not 0: out of memory.
    int unpack(AVPacket* packet);
    void reset() { kept_.clear(); }

private:
    PictureTypeReader types_;
    std::vector<uint8_t> kept_;
};

}  // namespace video
