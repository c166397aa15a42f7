#include "header_joiner.h"

#include <cstring>

#include "nal_units.h"

namespace video {
namespace {

constexpr size_t kMostHeld = size_t{1} << 20;  // bytes

}  // namespace

HeaderJoiner::HeaderJoiner(const AVCodecParameters& codec)
    : codec_id_(codec.codec_id), length_bytes_(nal_length_bytes(codec)) {}

bool HeaderJoiner::is_header(const uint8_t* unit, int size) const {
    if (size < 1) return false;
    if (codec_id_ == AV_CODEC_ID_H264) {
        constexpr int kSei = 6, kSpsExtension = 13;
        const int type = unit[0] & 31;
        return type >= kSei && type <= kSpsExtension;
    }
    constexpr int kVps = 32, kSuffixSei = 40;
    const int type = unit[0] >> 1 & 63;
    return type >= kVps && type <= kSuffixSei;
}

bool HeaderJoiner::hold(const AVPacket& packet) {
    const auto is_only_header = [this](const uint8_t* unit, int size) { return is_header(unit, size); };
    if (packet.size == 0 || packet.side_data_elems > 0 || held_.size() + packet.size > kMostHeld) return false;
    if (!visit_nal_units(packet.data, packet.size, length_bytes_, is_only_header)) return false;
    if (held_.empty()) {
        dts_ = packet.dts;
        byte_position_ = packet.pos;
        flags_ = 0;
    }
    flags_ |= packet.flags & AV_PKT_FLAG_KEY;
    held_.insert(held_.end(), packet.data, packet.data + packet.size);
    ++num_held_;
    return true;
}

int HeaderJoiner::join(AVPacket* packet) {
    if (held_.empty()) return 0;
    const auto num_held = static_cast<int>(held_.size());
    const int picture_bytes = packet->size;
    if (const int error = av_grow_packet(packet, num_held); error < 0) return error;
    if (const int error = av_packet_make_writable(packet); error < 0) return error;
    std::memmove(packet->data + num_held, packet->data, picture_bytes);
    std::memcpy(packet->data, held_.data(), num_held);
    packet->dts = dts_;
    packet->pos = byte_position_;
    packet->flags |= flags_;
    held_.clear();
    return 0;
}

}  // namespace video
