// What a coded packet says about itself without being decoded.
#pragma once

#include <array>
#include <cstdint>

#include "av1.h"
#include "ffmpeg.h"
#include "picture_order.h"
#include "picture_type.h"

namespace video {

struct PacketTraits {
    // Where references are not told apart, one place stands for all of them.
    ReferenceUse use = {1, 1};
    bool has_slices = false;
    uint8_t temporal_id = 0;
    bool is_hidden = false;  // decodes to no picture of its own
    bool is_entry = false;   // the bits prove that decoding may start here
    bool is_decodable_leading = false;  // shown before the key that it follows, without a need for what is before that
    bool is_second_field = false;  // completes the frame of the packet before
    bool lacks_field = false;      // the second field of its frame has to follow
    bool is_bidirectional = false;  // shown before the reference that was decoded last
    bool has_picture = false;      // a picture starts in it
    PictureOrder order;
};

// What reading the header of an H.264 slice takes of its sequence parameter set.
struct SequenceTraits {
    bool is_read = false;  // the set is there at all
    unsigned id = 0;
    bool is_frames_only = true;
    bool has_colour_planes = false;
    bool allows_gaps = false;
    int frame_number_bits = 4;
    int order_count_bits = 0;  // 0: not sent
};

class BitstreamReader {
public:
    explicit BitstreamReader(const AVCodecParameters* codec);

    PacketTraits read(const uint8_t* data, int size);
    // False once the stream showed layers, views or fields, where a picture's flags do not tell who refers to it.
    bool can_drop() const { return can_drop_; }

private:
    void read_avcc(const uint8_t* data, int size);
    void read_nal(const uint8_t* data, int size, PacketTraits* traits);
    void read_h264_nal(const uint8_t* data, int size, PacketTraits* traits);
    // `data` with the NAL header.
    void read_h264_slice(const uint8_t* data, int size, PacketTraits* traits);
    void read_hevc_nal(const uint8_t* data, int size, PacketTraits* traits);

    bool has_nal_units() const { return codec_id_ == AV_CODEC_ID_H264 || codec_id_ == AV_CODEC_ID_HEVC; }

    // A field whose frame still lacks the other one.
    struct OpenField {
        bool is_open = false;
        bool is_bottom = false;
        unsigned frame_number = 0;
    };

    AVCodecID codec_id_;
    std::array<SequenceTraits, 32> sequences_;          // by seq_parameter_set_id
    std::array<uint8_t, 256> sequence_of_picture_ = {};  // seq_parameter_set_id by pic_parameter_set_id
    OpenField open_field_;
    Av1Reader av1_;
    PictureTypeReader types_;
    int64_t num_references_ = 0;  // pictures so far that are not bidirectional
    int length_bytes_;  // before each unit; 0: start codes
    bool can_drop_ = false;
};

}  // namespace video
