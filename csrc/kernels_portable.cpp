#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace video {
namespace {

uint8_t clip(int value) { return static_cast<uint8_t>(std::clamp(value, 0, 255)); }

void yuv_row(const uint8_t* y, const uint8_t* u, const uint8_t* v, const YuvCoefficients& k, uint8_t* red,
             uint8_t* green, uint8_t* blue, int width) {
    const auto product = [](int a, int b) { return (a * b) >> 16; };
    for (int x = 0; x < width; ++x) {
        const int luma = product((y[x] << 3) - k.y_offset, k.y);
        const int chroma_u = (u[x / 2] << 3) - 1024;
        const int chroma_v = (v[x / 2] << 3) - 1024;
        red[x] = clip(luma + product(chroma_v, k.v_red));
        green[x] = clip(luma + product(chroma_u, k.u_green) + product(chroma_v, k.v_green));
        blue[x] = clip(luma + product(chroma_u, k.u_blue));
    }
}

void resize_row(const uint8_t* in, const ResizePlan& plan, uint8_t* out) {
    const int half = 1 << (plan.precision - 1);
    for (int i = 0; i < plan.out_size; ++i) {
        const uint8_t* window = in + plan.first[i];
        const int16_t* weights = plan.weights_of(i);
        int sum = half;
        for (int j = 0; j < plan.taps[i]; ++j) sum += window[j] * weights[j];
        out[i] = clip(sum >> plan.precision);
    }
}

void blend_rows(const uint8_t* const* rows, const int16_t* weights, int taps, int precision, uint8_t* out, int width) {
    constexpr int kBlock = 64;
    for (int start = 0; start < width; start += kBlock) {
        int sums[kBlock];
        std::fill(sums, sums + kBlock, 1 << (precision - 1));
        for (int j = 0; j < taps; ++j) {
            for (int x = 0; x < kBlock; ++x) sums[x] += rows[j][start + x] * weights[j];
        }
        for (int x = 0; x < kBlock; ++x) out[start + x] = clip(sums[x] >> precision);
    }
}

void normalise_float32(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    float* values = static_cast<float*>(out);
    for (int y = 0; y < size; ++y, in += stride) {
        for (int x = 0; x < size; ++x) *values++ = (static_cast<float>(in[x]) - mean) / std;
    }
}

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void normalise_bfloat16(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    uint16_t* values = static_cast<uint16_t*>(out);
    for (int y = 0; y < size; ++y, in += stride) {
        for (int x = 0; x < size; ++x) *values++ = to_bfloat16((static_cast<float>(in[x]) - mean) / std);
    }
}

}  // namespace

const Kernels kPortableKernels = {"portable", {},                yuv_row,           resize_row,
                                  blend_rows, normalise_float32, normalise_bfloat16};

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(__x86_64__)
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                            __builtin_cpu_supports("avx512vnni");
    if (has_avx512) usable.push_back(&kAvx512Kernels);
    if (__builtin_cpu_supports("avx2")) usable.push_back(&kAvx2Kernels);
#endif
    usable.push_back(&kPortableKernels);
    return usable;
}

const Kernels* find_kernels(const std::string& name) {
    for (const Kernels* kernels : usable_kernels()) {
        if (name.empty() || name == kernels->name) return kernels;
    }
    return nullptr;
}

}  // namespace video
