#include "picture_type.h"

#include "bit_reader.h"

namespace video {
namespace {

constexpr unsigned kIntra = 0;

BitReader reader_of(const uint8_t* data, int size) { return {data, size, BitReader::Emulation::kNone}; }

// ITU-T H.263 5.1.
bool is_h263_intra(const uint8_t* data, int size) {
    constexpr unsigned kStartCode = 32, kExtended = 7;
    BitReader reader = reader_of(data, size);
    if (reader.bits(22) != kStartCode) return false;
    reader.bits(8 + 5);
    if (reader.bits(3) != kExtended) return reader.bits(1) == kIntra;
    if (reader.bits(3) == 1) reader.bits(18);
    return reader.bits(3) == kIntra;
}

// H.263 as in FLV (SWF specification, H.263 video packet).
bool is_flv_intra(const uint8_t* data, int size) {
    BitReader reader = reader_of(data, size);
    if (reader.bits(17) != 1) return false;
    reader.bits(5 + 8);
    const unsigned size_code = reader.bits(3);
    if (size_code < 2) reader.bits(size_code == 0 ? 16 : 32);
    return reader.bits(2) == kIntra;
}

PictureType vp9_type(const uint8_t* data, int size) {
    if (size < 1) return {};
    const bool is_superframe = (data[size - 1] & 0xe0) == 0xc0;  // its last frame is shown
    BitReader reader = reader_of(data, size);
    reader.bits(2);
    const unsigned profile = reader.bits(1) | reader.bits(1) << 1;
    if (profile == 3) reader.bits(1);
    if (reader.bits(1)) return {};  // an earlier one is shown
    PictureType type;
    type.is_intra = reader.bits(1) == kIntra;
    type.is_shown = reader.bits(1) || is_superframe;
    return type;
}

// The parse units of Dirac and VC-2 (SMPTE ST 2042-1, 10): the end of a sequence may be a packet of its own.
PictureType dirac_type(const uint8_t* data, int size) {
    constexpr int kUnitHeader = 13;
    constexpr unsigned kSequenceHeader = 0, kPicture = 8, kReferences = 3;
    bool has_header = false;
    for (int at = 0; size - at >= kUnitHeader;) {
        BitReader reader = reader_of(data + at + 4, size - at - 4);
        const unsigned code = reader.bits(8);
        if (code & kPicture) return {has_header && !(code & kReferences)};
        has_header = has_header || code == kSequenceHeader;
        const unsigned length = reader.bits(32);
        if (length < kUnitHeader || length > static_cast<unsigned>(size - at)) break;
        at += static_cast<int>(length);
    }
    return {false, false, false, false};
}

}  // namespace

PictureTypeReader::PictureTypeReader(const AVCodecParameters* codec) : codec_id_(codec->codec_id) {
    const AVCodecDescriptor* descriptor = avcodec_descriptor_get(codec_id_);
    is_intra_only_ = descriptor && (descriptor->props & AV_CODEC_PROP_INTRA_ONLY);
    if (codec_id_ == AV_CODEC_ID_MPEG4) read_mpeg4_layer(codec->extradata, codec->extradata_size);
}

PictureType PictureTypeReader::read(const uint8_t* data, int size) {
    if (size < 1) return {};
    const auto intra = [](bool is_intra) { return PictureType{is_intra}; };
    const auto starts_with = [&](int skipped, int count) {
        BitReader reader = reader_of(data, size);
        reader.bits(skipped);
        return reader.bits(count);
    };
    switch (codec_id_) {
        case AV_CODEC_ID_MPEG1VIDEO:
        case AV_CODEC_ID_MPEG2VIDEO: return read_mpeg2(data, size);
        case AV_CODEC_ID_MPEG4: return read_mpeg4(data, size);
        case AV_CODEC_ID_H263: return intra(is_h263_intra(data, size));
        case AV_CODEC_ID_FLV1: return intra(is_flv_intra(data, size));
        case AV_CODEC_ID_MSMPEG4V1: return intra(starts_with(32 + 5, 2) == kIntra);
        case AV_CODEC_ID_MSMPEG4V2:
        case AV_CODEC_ID_MSMPEG4V3:
        case AV_CODEC_ID_WMV1: return intra(starts_with(0, 2) == kIntra);
        case AV_CODEC_ID_WMV2:
        case AV_CODEC_ID_VP6:
        case AV_CODEC_ID_VP6F: return intra(starts_with(0, 1) == kIntra);
        case AV_CODEC_ID_THEORA: {
            const bool is_header = starts_with(0, 1);  // of a file that is joined to the first
            return {starts_with(0, 2) == kIntra, false, false, !is_header};
        }
        case AV_CODEC_ID_DIRAC: return dirac_type(data, size);
        case AV_CODEC_ID_VP8: return {starts_with(7, 1) == kIntra, false, false, starts_with(3, 1) == 1};
        case AV_CODEC_ID_VP9: return vp9_type(data, size);
        default: return intra(is_intra_only_);
    }
}

// MPEG-1 and MPEG-2 (ISO/IEC 13818-2, 6.2.3).
PictureType PictureTypeReader::read_mpeg2(const uint8_t* data, int size) {
    constexpr int kPicture = 0, kGroup = 0xb8;
    constexpr unsigned kIntraPicture = 1, kBidirectional = 3;
    for (int at = find_start_code(data, size, 0); at + 4 < size; at = find_start_code(data, size, at + 3)) {
        BitReader reader = reader_of(data + at + 4, size - at - 4);
        if (data[at + 3] == kGroup) {
            reader.bits(25);
            is_closed_group_ = reader.bits(1);
        }
        if (data[at + 3] != kPicture) continue;
        reader.bits(10);
        const unsigned type = reader.bits(3);
        return {type == kIntraPicture, type == kBidirectional, is_closed_group_};
    }
    return {};
}

// ISO/IEC 14496-2, 6.2.3: how many bits the time of a picture takes, and whether it may have fields.
void PictureTypeReader::read_mpeg4_layer(const uint8_t* data, int size) {
    constexpr int kFirstLayer = 0x20, kLastLayer = 0x2f;
    constexpr unsigned kExtendedAspect = 15, kRectangular = 0, kGrey = 3;
    for (int at = find_start_code(data, size, 0); at + 4 < size; at = find_start_code(data, size, at + 3)) {
        if (data[at + 3] < kFirstLayer || data[at + 3] > kLastLayer) continue;
        BitReader reader = reader_of(data + at + 4, size - at - 4);
        reader.bits(1 + 8);
        unsigned version = 1;
        if (reader.bits(1)) {
            version = reader.bits(4);
            reader.bits(3);
        }
        if (reader.bits(4) == kExtendedAspect) reader.bits(16);
        if (reader.bits(1)) {  // vol_control_parameters
            reader.bits(2 + 1);
            if (reader.bits(1)) {  // vbv_parameters
                for (int bits : {32, 32, 15}) reader.bits(bits);
            }
        }
        const unsigned shape = reader.bits(2);
        if (shape == kGrey && version != 1) reader.bits(4);
        reader.bits(1);
        const unsigned resolution = reader.bits(16);
        time_increment_bits_ = 1;
        while (resolution > 1u << time_increment_bits_) ++time_increment_bits_;
        reader.bits(1);
        if (reader.bits(1)) reader.bits(time_increment_bits_);  // fixed_vop_rate
        if (shape == kRectangular) reader.bits(1 + 13 + 1 + 13 + 1);
        is_interlaced_ = reader.bits(1);
    }
}

// ISO/IEC 14496-2, 6.2.5.
PictureType PictureTypeReader::read_mpeg4(const uint8_t* data, int size) {
    constexpr int kPicture = 0xb6;
    constexpr unsigned kBidirectional = 2;
    for (int at = find_start_code(data, size, 0); at + 4 < size; at = find_start_code(data, size, at + 3)) {
        if (data[at + 3] != kPicture) continue;
        if (at > 0) read_mpeg4_layer(data, at);
        BitReader reader = reader_of(data + at + 4, size - at - 4);
        const unsigned code = reader.bits(2);
        PictureType type = {code == kIntra, code == kBidirectional};
        if (time_increment_bits_ == 0) return type;
        for (int seconds = 0; reader.bits(1) && seconds < size; ++seconds) {
        }
        reader.bits(1 + time_increment_bits_ + 1);
        type.is_shown = reader.bits(1);
        // Decoders reckon the times of fields from the first pictures that they see, and leave out others by them.
        type.is_intra = type.is_intra && type.is_shown && !is_interlaced_;
        return type;
    }
    return {};
}

}  // namespace video
