// The inner loops, once per instruction set; all give the same bits.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "color.h"
#include "weights.h"

namespace video {

struct Kernels {
    const char* name;
    Grouping grouping;

    // One row of planes to RGB; chroma is at half the width. Writes up to kRowPadding bytes over the width.
    void (*yuv_row)(const uint8_t* y, const uint8_t* u, const uint8_t* v, const YuvCoefficients& coefficients,
                    uint8_t* red, uint8_t* green, uint8_t* blue, int width);
    // plan.out_size pixels of one channel; reads and writes up to kRowPadding bytes over.
    void (*resize_row)(const uint8_t* in, const ResizePlan& plan, uint8_t* out);
    // One row out of `taps` rows of `width` bytes; writes up to kRowPadding bytes over.
    void (*blend_rows)(const uint8_t* const* rows, const int16_t* weights, int taps, int precision, uint8_t* out,
                       int width);
    // A size x size block of one channel to (x - mean) / std, as float32 and as bfloat16 (rounded to nearest even).
    void (*normalise_float32)(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out);
    void (*normalise_bfloat16)(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// What this processor can run, the fastest first.
std::vector<const Kernels*> usable_kernels();
// By name, or the fastest for "". Null for a name that is not usable here.
const Kernels* find_kernels(const std::string& name);

}  // namespace video
