// The fixed-point arithmetic of swscale's x86 YUV 4:2:0 to RGB conversion, which every CPU decoder library uses.
#pragma once

#include "ffmpeg.h"

namespace video {

// With m(a, b) = (a * b) >> 16: Y' = m((Y << 3) - y_offset, y); u, v = (U << 3) - 1024, (V << 3) - 1024;
// R = Y' + m(v, v_red), G = Y' + m(u, u_green) + m(v, v_green), B = Y' + m(u, u_blue), clipped to 0..255.
struct YuvCoefficients {
    int16_t y_offset;
    int16_t y;
    int16_t v_red;
    int16_t u_green;
    int16_t v_green;
    int16_t u_blue;
};

inline YuvCoefficients yuv_coefficients(int colorspace, bool full_range) {
    const auto fixed = [](int64_t value) { return static_cast<int16_t>((value * (1 << 13) + 32768) >> 16); };
    const int* table = sws_getCoefficients(colorspace);  // red of v, blue of u, green of u, green of v
    const auto chroma = [&](int i) { return full_range ? int64_t{table[i]} * 224 / 255 : int64_t{table[i]}; };
    return {static_cast<int16_t>(full_range ? 0 : 128),
            fixed(full_range ? 65536 : 65536 * 255 / 219),
            fixed(chroma(0)),
            fixed(-chroma(2)),
            fixed(-chroma(3)),
            fixed(chroma(1))};
}

}  // namespace video
