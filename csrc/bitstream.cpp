#include "bitstream.h"

#include <algorithm>

#include "nal_units.h"

namespace video {
namespace {

bool has_chroma_fields(unsigned profile) {
    constexpr unsigned kProfiles[] = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135};
    return std::find(std::begin(kProfiles), std::end(kProfiles), profile) != std::end(kProfiles);
}

void skip_scaling_list(BitReader& reader, int size) {
    int last = 8;
    int next = 8;
    for (int i = 0; i < size; ++i) {
        if (next != 0) next = (last + reader.signed_exp_golomb()) & 255;
        if (next != 0) last = next;
    }
}

// Of a sequence parameter set (H.264 7.3.2.1.1), `data` past the NAL header.
SequenceTraits read_sequence(const uint8_t* data, int size) {
    BitReader reader(data, size);
    SequenceTraits sequence;
    sequence.is_read = true;
    const unsigned profile = reader.bits(8);
    reader.bits(16);
    sequence.id = reader.exp_golomb();
    if (has_chroma_fields(profile)) {
        const unsigned chroma_format = reader.exp_golomb();
        if (chroma_format == 3) sequence.has_colour_planes = reader.bits(1);
        reader.exp_golomb();
        reader.exp_golomb();
        reader.bits(1);
        if (reader.bits(1)) {
            for (int list = 0; list < (chroma_format == 3 ? 12 : 8); ++list) {
                if (reader.bits(1)) skip_scaling_list(reader, list < 6 ? 16 : 64);
            }
        }
    }
    sequence.frame_number_bits = static_cast<int>(std::min(reader.exp_golomb(), 12u)) + 4;
    const unsigned order_type = reader.exp_golomb();
    if (order_type == 0) {
        sequence.order_count_bits = static_cast<int>(std::min(reader.exp_golomb(), 12u)) + 4;
    } else if (order_type == 1) {
        reader.bits(1);
        reader.exp_golomb();
        reader.exp_golomb();
        const unsigned cycle = std::min(reader.exp_golomb(), 255u);
        for (unsigned i = 0; i < cycle; ++i) reader.exp_golomb();
    }
    reader.exp_golomb();
    sequence.allows_gaps = reader.bits(1);
    reader.exp_golomb();
    reader.exp_golomb();
    sequence.is_frames_only = reader.bits(1);
    return sequence;
}

// Whether supplemental information, `data` past the NAL header, has a recovery point message (H.264 D.1.8).
bool has_recovery_point(const uint8_t* data, int size) {
    constexpr unsigned kRecoveryPoint = 6;
    const auto number = [&](int* at) {
        unsigned value = 0;
        while (*at < size && data[*at] == 255) value += data[(*at)++];
        return *at < size ? value + data[(*at)++] : value;
    };
    for (int at = 0; at + 2 < size;) {
        if (number(&at) == kRecoveryPoint) return true;
        at += static_cast<int>(std::min<unsigned>(number(&at), static_cast<unsigned>(size)));
    }
    return false;
}

void merge(PacketTraits* traits, bool is_reference, int temporal_id) {
    const bool was_reference = traits->has_slices && traits->use.writes != 0;
    traits->use.writes = is_reference || was_reference;
    traits->has_slices = true;
    traits->temporal_id = static_cast<uint8_t>(temporal_id);
}

}  // namespace

BitstreamReader::BitstreamReader(const AVCodecParameters* codec)
    : codec_id_(codec->codec_id), types_(codec), length_bytes_(nal_length_bytes(*codec)) {
    can_drop_ = has_nal_units() || codec_id_ == AV_CODEC_ID_AV1;
    const uint8_t* extra = codec->extradata;
    const int size = codec->extradata_size;
    constexpr int kAv1ConfigurationBytes = 4;  // before the sequence header (AV1CodecConfigurationRecord)
    if (codec_id_ == AV_CODEC_ID_H264 && length_bytes_ > 0) {
        read_avcc(extra, size);
    } else if (codec_id_ == AV_CODEC_ID_AV1 && size > kAv1ConfigurationBytes) {
        bool ignored = false;
        av1_.read(extra + kAv1ConfigurationBytes, size - kAv1ConfigurationBytes, &ignored);
    } else if (has_nal_units() && length_bytes_ == 0) {
        read(extra, size);
    }
}

// The parameter sets of an AVCDecoderConfigurationRecord (ISO/IEC 14496-15).
void BitstreamReader::read_avcc(const uint8_t* data, int size) {
    PacketTraits ignored;
    int at = 5;
    for (const int mask : {31, 255}) {
        int count = at < size ? data[at++] & mask : 0;
        for (; count > 0 && at + 2 <= size; --count) {
            const int length = std::min(data[at] << 8 | data[at + 1], size - at - 2);
            read_nal(data + at + 2, length, &ignored);
            at += 2 + length;
        }
    }
}

PacketTraits BitstreamReader::read(const uint8_t* data, int size) {
    PacketTraits traits;
    if (codec_id_ == AV_CODEC_ID_AV1) {
        traits.use = av1_.read(data, size, &traits.is_entry);
        return traits;
    }
    if (!has_nal_units()) {
        const PictureType type = types_.read(data, size);
        traits.is_entry = type.is_intra;
        // A decoder leaves out what refers to a picture from before the stream.
        const bool lacks_reference = type.is_bidirectional && num_references_ < 2 && !type.is_in_closed_group;
        traits.is_hidden = !type.is_shown || lacks_reference;
        traits.is_bidirectional = type.is_bidirectional;
        if (!type.is_bidirectional && type.is_shown) ++num_references_;
        return traits;
    }
    visit_nal_units(data, size, length_bytes_, [&](const uint8_t* unit, int unit_size) {
        read_nal(unit, unit_size, &traits);
        return true;
    });
    return traits;
}

void BitstreamReader::read_nal(const uint8_t* data, int size, PacketTraits* traits) {
    if (size < 2) return;
    if (codec_id_ == AV_CODEC_ID_H264) {
        read_h264_nal(data, size, traits);
    } else {
        read_hevc_nal(data, size, traits);
    }
}

void BitstreamReader::read_h264_nal(const uint8_t* data, int size, PacketTraits* traits) {
    constexpr int kIdr = 5, kSei = 6, kSps = 7, kPps = 8;
    constexpr int kPrefix = 14, kSubsetSps = 15, kSliceExtension = 20, kDepthExtension = 21;
    const int type = data[0] & 31;
    const bool is_slice = type >= 1 && type <= 5;
    if (is_slice) {
        merge(traits, data[0] >> 5 & 3, 0);
        read_h264_slice(data, size, traits);
    }
    if (type == kIdr || (type == kSei && has_recovery_point(data + 1, size - 1))) traits->is_entry = true;
    const bool has_layers = type == kPrefix || type == kSubsetSps || type == kSliceExtension || type == kDepthExtension;
    if (has_layers) can_drop_ = false;
    if (type == kSps) {
        const SequenceTraits sequence = read_sequence(data + 1, size - 1);
        if (sequence.id < sequences_.size()) sequences_[sequence.id] = sequence;
        if (!sequence.is_frames_only) can_drop_ = false;
    }
    if (type == kPps) {
        BitReader reader(data + 1, size - 1);
        const unsigned id = reader.exp_golomb();
        const unsigned sequence_id = reader.exp_golomb();
        if (id < sequence_of_picture_.size() && sequence_id < sequences_.size()) {
            sequence_of_picture_[id] = static_cast<uint8_t>(sequence_id);
        }
    }
}

// H.264 7.3.3: the number of a frame, or which fields make one, that may come in packets of their own (7.4.1.2.4).
void BitstreamReader::read_h264_slice(const uint8_t* data, int size, PacketTraits* traits) {
    BitReader reader(data + 1, size - 1);
    if (reader.exp_golomb() != 0) return;  // not the first slice of its picture
    reader.exp_golomb();
    const unsigned picture_id = reader.exp_golomb();
    if (picture_id >= sequence_of_picture_.size()) return;
    const SequenceTraits& sequence = sequences_[sequence_of_picture_[picture_id]];
    if (!sequence.is_read) return;
    if (sequence.has_colour_planes) reader.bits(2);
    const unsigned frame_number = reader.bits(sequence.frame_number_bits);
    if (sequence.is_frames_only) {
        PictureOrder& order = traits->order;
        order.is_known = true;
        order.is_idr = (data[0] & 31) == 5;
        order.is_reference = data[0] >> 5 & 3;
        order.allows_gaps = sequence.allows_gaps;
        order.frame_number = static_cast<int>(frame_number);
        order.frame_number_range = 1 << sequence.frame_number_bits;
        if (order.is_idr) reader.exp_golomb();
        if (sequence.order_count_bits > 0) order.count = static_cast<int>(reader.bits(sequence.order_count_bits));
        order.count_range = 1 << sequence.order_count_bits;
        return;
    }
    const bool is_field = reader.bits(1);
    const bool is_bottom = is_field && reader.bits(1);
    const bool completes = is_field && open_field_.is_open && open_field_.is_bottom != is_bottom &&
                           open_field_.frame_number == frame_number;
    if (completes && !traits->has_picture) traits->is_second_field = true;
    open_field_ = {is_field && !completes, is_bottom, frame_number};
    traits->lacks_field = open_field_.is_open;
    traits->has_picture = true;
}

void BitstreamReader::read_hevc_nal(const uint8_t* data, int, PacketTraits* traits) {
    constexpr int kFirstRadl = 6, kLastRadl = 7, kFirstEntry = 16, kLastEntry = 21;
    const int type = data[0] >> 1 & 63;
    const int layer = (data[0] & 1) << 5 | data[1] >> 3;
    const int temporal_id = (data[1] & 7) - 1;
    if (layer > 0) can_drop_ = false;
    if (type >= kFirstEntry && type <= kLastEntry) traits->is_entry = true;
    if (type >= kFirstRadl && type <= kLastRadl) traits->is_decodable_leading = true;
    if (type < 32) merge(traits, type > 14 || type % 2 == 1, temporal_id);
}

}  // namespace video
