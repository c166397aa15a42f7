// What the headers of AV1 tell about which frames a frame needs.
#pragma once

#include <cstdint>

#include "bit_reader.h"

namespace video {

// Places of a decoder's reference memory, a bit each.
struct ReferenceUse {
    uint8_t reads = 0;   // taken from
    uint8_t writes = 0;  // overwritten
};

class Av1Reader {
public:
    // Of a temporal unit, or of the header objects of a container. `starts_with_key` is set when there is a frame.
    ReferenceUse read(const uint8_t* data, int size, bool* starts_with_key);

private:
    // Of the sequence header (AV1 5.5.1), what has to be known to read a frame header.
    struct Sequence {
        bool is_readable = false;
        bool is_still = false;  // every frame is a key frame, without a header that says so
        unsigned force_screen_content_tools = kSelect;
        unsigned force_integer_mv = kSelect;
        bool has_order_hint = false;
        int order_hint_bits = 0;
    };
    static constexpr unsigned kSelect = 2;  // each frame says so itself

    static Sequence read_sequence(BitReader reader);
    ReferenceUse read_frame(BitReader reader);

    Sequence sequence_;
    uint8_t key_places_ = 0;  // that hold a key frame
};

}  // namespace video
