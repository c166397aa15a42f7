// What a packet of the codecs before H.264, and of VP3 to VP9, says about its picture in its first bits.
#pragma once

#include <cstdint>

#include "ffmpeg.h"

namespace video {

struct PictureType {
    bool is_intra = false;  // refers to no other; decoding may start with it
    bool is_bidirectional = false;
    bool is_in_closed_group = false;  // does not refer to what comes before the intra picture that it follows
    bool is_shown = true;   // there is a picture to show at all
};

// Of one stream, whose headers are remembered.
class PictureTypeReader {
public:
    explicit PictureTypeReader(const AVCodecParameters* codec);

    // Of a codec that this does not know, no picture is taken for intra.
    PictureType read(const uint8_t* data, int size);

private:
    void read_mpeg4_layer(const uint8_t* data, int size);
    PictureType read_mpeg2(const uint8_t* data, int size);
    PictureType read_mpeg4(const uint8_t* data, int size);

    AVCodecID codec_id_;
    bool is_intra_only_ = false;
    bool is_closed_group_ = false;  // of MPEG-2
    bool is_interlaced_ = false;    // of MPEG-4
    int time_increment_bits_ = 0;  // of MPEG-4; 0: not known
};

}  // namespace video
