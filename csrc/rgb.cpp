#include "rgb.h"

#include <cstring>

namespace video {
namespace {

int padded(int width) { return (width + 63) / 64 * 64 + kRowPadding; }

// What swscale converts with its special converter, whose arithmetic the kernels repeat; odd heights take its long way.
bool is_yuv420(const AVFrame& frame) {
    return (frame.format == AV_PIX_FMT_YUV420P || frame.format == AV_PIX_FMT_YUVJ420P) && frame.height % 2 == 0;
}

bool is_full_range(const AVFrame& frame) {
    return frame.color_range == AVCOL_RANGE_JPEG || frame.format == AV_PIX_FMT_YUVJ420P;
}

}  // namespace

Status RgbSource::set(const AVFrame& frame) {
    frame_ = &frame;
    width_ = frame.width;
    height_ = frame.height;
    stride_ = padded(width_);
    coefficients_ = yuv_coefficients(frame.colorspace, is_full_range(frame));
    is_direct_ = is_yuv420(frame) && orientation_.is_identity();
    if (is_direct_) {
        planes_.resize(size_t{3} * stride_);
        return {};
    }
    planes_.resize(size_t{3} * stride_ * height_);
    if (is_yuv420(frame)) {
        for (int y = 0; y < height_; ++y) convert_row(y, planes_.data() + size_t{3} * stride_ * y, stride_);
    } else if (Status converted = convert_other(frame); !converted.ok()) {
        return converted;
    }
    if (!orientation_.is_identity()) orient();
    return {};
}

RgbSource::Row RgbSource::row(int y) {
    uint8_t* row = planes_.data() + (is_direct_ ? 0 : size_t{3} * stride_ * y);
    if (is_direct_) convert_row(y, row, stride_);
    return {{row, row + stride_, row + 2 * stride_}};
}

void RgbSource::copy_row(int y, uint8_t* out, int stride) {
    if (is_direct_) return convert_row(y, out, stride);
    const Row from = row(y);
    for (int c = 0; c < 3; ++c) std::memcpy(out + c * stride, from.channels[c], width_);
}

void RgbSource::convert_row(int y, uint8_t* out, int stride) const {
    kernels_.yuv_row(frame_->data[0] + ptrdiff_t{y} * frame_->linesize[0],
                     frame_->data[1] + ptrdiff_t{y / 2} * frame_->linesize[1],
                     frame_->data[2] + ptrdiff_t{y / 2} * frame_->linesize[2], coefficients_, out, out + stride,
                     out + 2 * stride, frame_->width);
}

// Other layouts, through swscale.
Status RgbSource::convert_other(const AVFrame& frame) {
    scaler_.reset(sws_getCachedContext(scaler_.release(), frame.width, frame.height,
                                       static_cast<AVPixelFormat>(frame.format), frame.width, frame.height,
                                       AV_PIX_FMT_RGB24, SWS_BICUBIC, nullptr, nullptr, nullptr));
    if (!scaler_) return {Code::kDecodeFailed, "pixel format without a conversion to RGB"};
    const int* table = sws_getCoefficients(frame.colorspace);
    sws_setColorspaceDetails(scaler_.get(), table, is_full_range(frame), table, 1, 0, 1 << 16, 1 << 16);
    const int packed_stride = padded(3 * frame.width);
    packed_.resize(static_cast<size_t>(packed_stride) * frame.height);
    uint8_t* to[4] = {packed_.data()};
    const int strides[4] = {packed_stride};
    if (sws_scale(scaler_.get(), frame.data, frame.linesize, 0, frame.height, to, strides) != frame.height) {
        return {Code::kDecodeFailed, "conversion to RGB failed"};
    }
    for (int y = 0; y < frame.height; ++y) {
        const uint8_t* from = packed_.data() + static_cast<size_t>(packed_stride) * y;
        uint8_t* row = planes_.data() + size_t{3} * stride_ * y;
        for (int x = 0; x < frame.width; ++x) {
            for (int c = 0; c < 3; ++c) row[c * stride_ + x] = from[3 * x + c];
        }
    }
    return {};
}

void RgbSource::orient() {
    const int width = orientation_.transpose ? height_ : width_;
    const int height = orientation_.transpose ? width_ : height_;
    const int stride = padded(width);
    turned_.resize(size_t{3} * stride * height);
    for (int y = 0; y < height; ++y) {
        const int from_y = orientation_.mirror_y ? height - 1 - y : y;
        for (int c = 0; c < 3; ++c) {
            uint8_t* row = turned_.data() + (size_t{3} * y + c) * stride;
            for (int x = 0; x < width; ++x) {
                const int from_x = orientation_.mirror_x ? width - 1 - x : x;
                const int source_x = orientation_.transpose ? from_y : from_x;
                const int source_y = orientation_.transpose ? from_x : from_y;
                row[x] = planes_[(size_t{3} * source_y + c) * stride_ + source_x];
            }
        }
    }
    planes_.swap(turned_);
    width_ = width;
    height_ = height;
    stride_ = stride;
}

}  // namespace video
