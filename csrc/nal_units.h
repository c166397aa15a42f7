// The units that packets of H.264 and HEVC are made of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bit_reader.h"
#include "ffmpeg.h"

namespace video {

// Bytes of the length before each unit; 0: start codes part them.
inline int nal_length_bytes(const AVCodecParameters& codec) {
    const uint8_t* extra = codec.extradata;
    const int size = codec.extradata_size;
    if (codec.codec_id == AV_CODEC_ID_H264 && size >= 7 && extra[0] == 1) return (extra[4] & 3) + 1;
    const bool has_record = size >= 23 && (extra[0] || extra[1] || extra[2] > 1);
    return codec.codec_id == AV_CODEC_ID_HEVC && has_record ? (extra[21] & 3) + 1 : 0;
}

// `visit` takes each unit, with its header, as (data, size) until it returns false. Whether it took all, and they fill
// the packet.
template <class Visit>
bool visit_nal_units(const uint8_t* data, int size, int length_bytes, Visit visit) {
    if (length_bytes == 0) {
        const int first = find_start_code(data, size, 0);
        for (int at = first; at < size;) {
            const int next = find_start_code(data, size, at + 3);
            if (!visit(data + at + 3, next - at - 3)) return false;
            at = next;
        }
        return first <= 1;
    }
    int at = 0;
    while (at + length_bytes < size) {
        uint32_t length = 0;
        for (int i = 0; i < length_bytes; ++i) length = length << 8 | data[at + i];
        at += length_bytes;
        const auto left = static_cast<uint32_t>(size - at);
        if (!visit(data + at, static_cast<int>(std::min(length, left))) || length > left) return false;
        at += static_cast<int>(length);
    }
    return at == size;
}

}  // namespace video
