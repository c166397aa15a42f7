#include "unwritten.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace video {
namespace {

// What no picture has in its place.
constexpr uint64_t kMark = 0x9e3779b97f4a7c15;
// Every coding block of these codecs covers the corner of such a square, in lines of both fields.
constexpr int kBlock = 16;
constexpr int kFields = 2;

constexpr AVCodecID kMarked[] = {AV_CODEC_ID_H264, AV_CODEC_ID_HEVC, AV_CODEC_ID_VVC, AV_CODEC_ID_MPEG1VIDEO,
                                 AV_CODEC_ID_MPEG2VIDEO};

// `visit` takes where each mark in the first plane is, until it returns true; whether it did. The picture that is shown
// may be a part of the one that is coded: only blocks that it touches count.
template <class Visit>
bool visit_marks(const AVFrame& frame, Visit visit) {
    uint8_t* coded = frame.buf[0]->data;
    const int line = frame.linesize[0];
    const int pixel = av_pix_fmt_desc_get(static_cast<AVPixelFormat>(frame.format))->comp[0].step;
    const auto offset = static_cast<int>(frame.data[0] - coded);
    const int top = offset / line;
    const int left = offset % line / pixel;
    for (int y = top / kBlock * kBlock; y < top + frame.height; y += kBlock) {
        for (int x = left / kBlock * kBlock; x < left + frame.width; x += kBlock) {
            for (int field = 0; field < kFields; ++field) {
                if (visit(coded + int64_t{y + field} * line + int64_t{x} * pixel)) return true;
            }
        }
    }
    return false;
}

int get_marked_buffer(AVCodecContext* context, AVFrame* frame, int flags) {
    const int error = avcodec_default_get_buffer2(context, frame, flags);
    if (error < 0) return error;
    visit_marks(*frame, [](uint8_t* at) {
        std::memcpy(at, &kMark, sizeof kMark);
        return false;
    });
    return error;
}

}  // namespace

bool mark_buffers(AVCodecContext* context) {
    const bool is_known = std::find(std::begin(kMarked), std::end(kMarked), context->codec_id) != std::end(kMarked);
    if (is_known) context->get_buffer2 = get_marked_buffer;
    return is_known;
}

bool has_unwritten_part(const AVFrame& frame) {
    return visit_marks(frame, [](const uint8_t* at) { return std::memcmp(at, &kMark, sizeof kMark) == 0; });
}

}  // namespace video
