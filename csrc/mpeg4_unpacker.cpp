#include "mpeg4_unpacker.h"

#include <cstring>

#include "bit_reader.h"

namespace video {
namespace {

// Where the frame after the first one begins, or `size`.
int find_second_frame(const uint8_t* data, int size) {
    constexpr int kFrame = 0xb6;
    int num_frames = 0;
    for (int at = find_start_code(data, size, 0); at + 3 < size; at = find_start_code(data, size, at + 3)) {
        if (data[at + 3] == kFrame && ++num_frames == 2) return at;
    }
    return size;
}

}  // namespace

int Mpeg4Unpacker::unpack(AVPacket* packet) {
    const bool is_placeholder = packet->size == 0 || !types_.read(packet->data, packet->size).is_shown;
    std::vector<uint8_t> rest;
    if (!kept_.empty()) {
        if (!is_placeholder) rest.assign(packet->data, packet->data + packet->size);
        AVBufferRef* buffer = av_buffer_allocz(kept_.size() + AV_INPUT_BUFFER_PADDING_SIZE);
        if (!buffer) return AVERROR(ENOMEM);
        std::memcpy(buffer->data, kept_.data(), kept_.size());
        av_buffer_unref(&packet->buf);
        packet->buf = buffer;
        packet->data = buffer->data;
        packet->size = static_cast<int>(kept_.size());
    }
    const int end = find_second_frame(packet->data, packet->size);
    kept_.assign(packet->data + end, packet->data + packet->size);
    kept_.insert(kept_.end(), rest.begin(), rest.end());
    packet->size = end;
    return 0;
}

}  // namespace video
