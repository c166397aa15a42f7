#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#define AVX2 __attribute__((target("avx2")))

namespace video {
namespace {

constexpr int kYuvStep = 32;

__m256i AVX2 load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
__m128i AVX2 load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
void AVX2 store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

struct Yuv {
    __m256i y_offset, y, v_red, u_green, v_green, u_blue;
};

// Chroma counts for two pixels: unpacking a value with itself doubles it in the order in which luma is unpacked.
void AVX2 yuv_step(const uint8_t* y, const uint8_t* u, const uint8_t* v, const Yuv& k, uint8_t* red, uint8_t* green,
                   uint8_t* blue) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i center = _mm256_set1_epi16(1024);
    const __m256i luma = load(y);
    const auto scaled = [&](__m256i unpacked) AVX2 {
        return _mm256_mulhi_epi16(_mm256_sub_epi16(_mm256_slli_epi16(unpacked, 3), k.y_offset), k.y);
    };
    const __m256i low = scaled(_mm256_unpacklo_epi8(luma, zero));
    const __m256i high = scaled(_mm256_unpackhi_epi8(luma, zero));
    const __m256i chroma_u = _mm256_sub_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_half(u)), 3), center);
    const __m256i chroma_v = _mm256_sub_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_half(v)), 3), center);
    const auto add = [&](uint8_t* to, __m256i chroma) AVX2 {
        store(to, _mm256_packus_epi16(_mm256_add_epi16(low, _mm256_unpacklo_epi16(chroma, chroma)),
                                      _mm256_add_epi16(high, _mm256_unpackhi_epi16(chroma, chroma))));
    };
    add(red, _mm256_mulhi_epi16(chroma_v, k.v_red));
    add(green, _mm256_add_epi16(_mm256_mulhi_epi16(chroma_u, k.u_green), _mm256_mulhi_epi16(chroma_v, k.v_green)));
    add(blue, _mm256_mulhi_epi16(chroma_u, k.u_blue));
}

void AVX2 yuv_row(const uint8_t* y, const uint8_t* u, const uint8_t* v, const YuvCoefficients& c, uint8_t* red,
                  uint8_t* green, uint8_t* blue, int width) {
    const Yuv k = {_mm256_set1_epi16(c.y_offset), _mm256_set1_epi16(c.y),       _mm256_set1_epi16(c.v_red),
                   _mm256_set1_epi16(c.u_green),  _mm256_set1_epi16(c.v_green), _mm256_set1_epi16(c.u_blue)};
    int x = 0;
    for (; x + kYuvStep <= width; x += kYuvStep) {
        yuv_step(y + x, u + x / 2, v + x / 2, k, red + x, green + x, blue + x);
    }
    if (x == width) return;
    uint8_t tail_y[kYuvStep] = {}, tail_u[kYuvStep / 2] = {}, tail_v[kYuvStep / 2] = {};
    std::memcpy(tail_y, y + x, width - x);
    std::memcpy(tail_u, u + x / 2, (width - x + 1) / 2);
    std::memcpy(tail_v, v + x / 2, (width - x + 1) / 2);
    yuv_step(tail_y, tail_u, tail_v, k, red + x, green + x, blue + x);
}

uint8_t AVX2 clip(int value) { return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value); }

// For scales at which neighbouring outputs share too little: one output at a time.
void AVX2 resize_row_wide(const uint8_t* in, const ResizePlan& plan, uint8_t* out) {
    for (int i = 0; i < plan.out_size; ++i) {
        const int16_t* weights = plan.weights_of(i);
        __m256i sums = _mm256_setzero_si256();
        for (int j = 0; j < plan.taps[i]; j += 16) {
            const __m256i pixels = _mm256_cvtepu8_epi16(load_half(in + plan.first[i] + j));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, load(weights + j)));
        }
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
        out[i] = clip((_mm_cvtsi128_si32(sum) + (1 << (plan.precision - 1))) >> plan.precision);
    }
}

void AVX2 resize_row(const uint8_t* in, const ResizePlan& plan, uint8_t* out) {
    if (plan.num_vectors == 0) return resize_row_wide(in, plan, out);
    const __m256i half = _mm256_set1_epi32(1 << (plan.precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(plan.precision);
    const int16_t* weights = plan.pair_weights.data();
    for (int i = 0; i < plan.num_vectors; ++i) {
        const uint8_t* low = in + plan.bases[2 * i];
        const uint8_t* high = in + plan.bases[2 * i + 1];
        const __m256i shuffle = load(plan.shuffles.data() + 32 * i);
        __m256i sums = half;
        for (int pair = 0; pair < plan.num_pairs; ++pair, weights += 16) {
            const __m256i window = _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(low + 2 * pair)),
                                                           load_half(high + 2 * pair), 1);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(window, shuffle), load(weights)));
        }
        sums = _mm256_sra_epi32(sums, shift);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_packus_epi16(words, words));
    }
}

void AVX2 blend_rows(const uint8_t* const* rows, const int16_t* weights, int taps, int precision, uint8_t* out,
                     int width) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    for (int x = 0; x < width; x += 32) {
        __m256i sums[4] = {half, half, half, half};
        for (int j = 0; j < taps; j += 2) {
            const bool has_second = j + 1 < taps;
            const uint32_t second_weight = has_second ? static_cast<uint16_t>(weights[j + 1]) : 0;
            const uint32_t both_weights = static_cast<uint16_t>(weights[j]) | second_weight << 16;
            const __m256i pair = _mm256_set1_epi32(static_cast<int>(both_weights));
            const __m256i first = load(rows[j] + x);
            const __m256i second = load(rows[has_second ? j + 1 : j] + x);
            const __m256i low = _mm256_unpacklo_epi8(first, second);
            const __m256i high = _mm256_unpackhi_epi8(first, second);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
        store(out + x,
              _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3])));
    }
}

__m256 AVX2 normalised(const uint8_t* in, __m256 mean, __m256 std) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
    return _mm256_div_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), mean), std);
}

// Lanes of the vector that starts at `x` in a row of `size`.
__m256i AVX2 lanes_left(int size, int x) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(size - x), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

void AVX2 normalise_float32(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    const __m256 means = _mm256_set1_ps(mean);
    const __m256 stds = _mm256_set1_ps(std);
    float* values = static_cast<float*>(out);
    for (int y = 0; y < size; ++y, in += stride, values += size) {
        int x = 0;
        for (; x + 8 <= size; x += 8) _mm256_storeu_ps(values + x, normalised(in + x, means, stds));
        if (x < size) _mm256_maskstore_ps(values + x, lanes_left(size, x), normalised(in + x, means, stds));
    }
}

__m128i AVX2 to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

void AVX2 normalise_bfloat16(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    const __m256 means = _mm256_set1_ps(mean);
    const __m256 stds = _mm256_set1_ps(std);
    uint16_t* values = static_cast<uint16_t*>(out);
    for (int y = 0; y < size; ++y, in += stride, values += size) {
        int x = 0;
        for (; x + 8 <= size; x += 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(values + x), to_bfloat16(normalised(in + x, means, stds)));
        }
        if (x == size) continue;
        uint16_t tail[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(tail), to_bfloat16(normalised(in + x, means, stds)));
        std::memcpy(values + x, tail, (size - x) * sizeof(uint16_t));
    }
}

}  // namespace

const Kernels kAvx2Kernels = {"avx2",     {8, 4, 16},        yuv_row,           resize_row,
                              blend_rows, normalise_float32, normalise_bfloat16};

}  // namespace video

#endif
