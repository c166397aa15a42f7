#include "av1.h"

#include <algorithm>

namespace video {
namespace {

constexpr ReferenceUse kEverything = {255, 255};

// Of a frame header: a key frame that is shown at once.
bool is_shown_key(BitReader reader) { return reader.bits(4) == 1; }

}  // namespace

ReferenceUse Av1Reader::read(const uint8_t* data, int size, bool* starts_with_key) {
    constexpr int kSequence = 1, kFrameHeader = 3, kFrame = 6;
    bool has_frame = false;
    ReferenceUse use;
    for (int at = 0; at < size;) {
        const int type = data[at] >> 3 & 15;
        const bool has_extension = data[at] >> 2 & 1;
        const bool has_size = data[at] >> 1 & 1;
        at += has_extension ? 2 : 1;
        uint64_t length = has_size ? 0 : UINT64_MAX;
        for (int shift = 0; has_size && at < size && shift < 56; shift += 7) {
            length |= uint64_t{data[at] & 127u} << shift;
            if (data[at++] < 128) break;
        }
        if (at >= size) break;
        const int end = at + static_cast<int>(std::min<uint64_t>(length, static_cast<uint64_t>(size - at)));
        const BitReader reader(data + at, end - at, BitReader::Emulation::kNone);
        if (type == kSequence) sequence_ = read_sequence(reader);
        if (type == kFrameHeader || type == kFrame) {
            const ReferenceUse frame = read_frame(reader);
            if (!has_frame) *starts_with_key = sequence_.is_still || is_shown_key(reader);
            use.reads |= frame.reads & ~use.writes;
            use.writes |= frame.writes;
            has_frame = true;
        }
        at = end;
    }
    return has_frame ? use : kEverything;
}

Av1Reader::Sequence Av1Reader::read_sequence(BitReader reader) {
    Sequence sequence;
    reader.bits(3 + 1);
    sequence.is_still = reader.bits(1);
    if (sequence.is_still) return sequence;
    if (reader.bits(1)) {
        reader.bits(32);
        reader.bits(32);
        if (reader.bits(1)) reader.exp_golomb();
        if (reader.bits(1)) return sequence;  // frame headers with a decoder model are not read here
    }
    const bool has_delay = reader.bits(1);
    const unsigned num_operating_points = reader.bits(5) + 1;
    for (unsigned i = 0; i < num_operating_points; ++i) {
        constexpr unsigned kLastLevelWithoutTier = 7;
        reader.bits(12);
        if (reader.bits(5) > kLastLevelWithoutTier) reader.bits(1);
        if (has_delay && reader.bits(1)) reader.bits(4);
    }
    const int width_bits = static_cast<int>(reader.bits(4)) + 1;
    const int height_bits = static_cast<int>(reader.bits(4)) + 1;
    reader.bits(width_bits);
    reader.bits(height_bits);
    if (reader.bits(1)) return sequence;  // nor are those with frame identifiers
    reader.bits(3 + 4);
    sequence.has_order_hint = reader.bits(1);
    if (sequence.has_order_hint) reader.bits(2);
    if (!reader.bits(1)) sequence.force_screen_content_tools = reader.bits(1);
    if (sequence.force_screen_content_tools > 0 && !reader.bits(1)) sequence.force_integer_mv = reader.bits(1);
    if (sequence.has_order_hint) sequence.order_hint_bits = static_cast<int>(reader.bits(3)) + 1;
    sequence.is_readable = true;
    return sequence;
}

// AV1 5.9.2, up to ref_frame_idx. Motion, probabilities, segments and grain come from those frames, too.
ReferenceUse Av1Reader::read_frame(BitReader reader) {
    enum : unsigned { kKey, kInter, kIntra, kSwitch };
    constexpr int kNumPlaces = 8, kNumReferences = 7;
    if (!sequence_.is_readable) return kEverything;
    if (reader.bits(1)) {
        const auto shown = static_cast<uint8_t>(1 << reader.bits(3));
        if (!(key_places_ & shown)) return {shown, 0};
        key_places_ = 255;  // a key frame that waited to be shown starts anew
        return {shown, 255};
    }
    const unsigned type = reader.bits(2);
    const bool is_shown = reader.bits(1);
    if (!is_shown) reader.bits(1);
    const bool renews_all = type == kSwitch || (type == kKey && is_shown);
    const bool is_error_resilient = renews_all || reader.bits(1);
    reader.bits(1);
    const bool selects = sequence_.force_screen_content_tools == kSelect;
    const bool has_tools = selects ? reader.bits(1) : sequence_.force_screen_content_tools;
    if (has_tools && sequence_.force_integer_mv == kSelect) reader.bits(1);
    if (type != kSwitch) reader.bits(1);
    reader.bits(sequence_.order_hint_bits);
    const bool is_intra = type == kKey || type == kIntra;
    if (!is_intra && !is_error_resilient) reader.bits(3);
    ReferenceUse use;
    use.writes = static_cast<uint8_t>(renews_all ? 255 : reader.bits(8));
    key_places_ = type == kKey ? key_places_ | use.writes : key_places_ & ~use.writes;
    if (is_intra) return use;
    if (is_error_resilient && sequence_.has_order_hint) {
        for (int i = 0; i < kNumPlaces; ++i) reader.bits(sequence_.order_hint_bits);
    }
    if (sequence_.has_order_hint && reader.bits(1)) return {255, use.writes};  // only two are named
    for (int i = 0; i < kNumReferences; ++i) use.reads |= 1 << reader.bits(3);
    return use;
}

}  // namespace video
