// The rows of a decoded frame as planar RGB, turned as the file asks.
#pragma once

#include <vector>

#include "index.h"
#include "kernels.h"

namespace video {

class RgbSource {
public:
    RgbSource(Orientation orientation, const Kernels& kernels) : orientation_(orientation), kernels_(kernels) {}

    // `frame` must stay until the last row is taken.
    Status set(const AVFrame& frame);
    int width() const { return width_; }
    int height() const { return height_; }

    // Red, green and blue of a row, kRowPadding bytes readable past the width; valid until the next call.
    struct Row {
        const uint8_t* channels[3];
    };
    Row row(int y);
    // The same written to `out`, channels `stride` (a multiple of 64) bytes apart.
    void copy_row(int y, uint8_t* out, int stride);

private:
    void convert_row(int y, uint8_t* out, int stride) const;
    Status convert_other(const AVFrame& frame);
    void orient();

    Orientation orientation_;
    const Kernels& kernels_;
    const AVFrame* frame_ = nullptr;
    bool is_direct_ = false;  // rows are converted when asked for
    int width_ = 0;
    int height_ = 0;
    int stride_ = 0;
    YuvCoefficients coefficients_ = {};
    std::vector<uint8_t> planes_;  // one row of three channels if direct, else the picture
    std::vector<uint8_t> turned_;
    std::vector<uint8_t> packed_;
    ScalerPtr scaler_;
};

}  // namespace video
