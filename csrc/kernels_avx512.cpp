#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

namespace video {
namespace {

constexpr int kYuvStep = 64;

__m512i AVX512 load(const void* from) { return _mm512_loadu_si512(from); }

struct Yuv {
    __m512i y_offset, y, v_red, u_green, v_green, u_blue;
};

// Chroma counts for two pixels: unpacking a value with itself doubles it in the order in which luma is unpacked.
void AVX512 yuv_step(const uint8_t* y, const uint8_t* u, const uint8_t* v, const Yuv& k, uint8_t* red, uint8_t* green,
                     uint8_t* blue) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i center = _mm512_set1_epi16(1024);
    const __m512i luma = load(y);
    const auto scaled = [&](__m512i unpacked) AVX512 {
        return _mm512_mulhi_epi16(_mm512_sub_epi16(_mm512_slli_epi16(unpacked, 3), k.y_offset), k.y);
    };
    const auto chroma_of = [&](const uint8_t* from) AVX512 {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_sub_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 3), center);
    };
    const __m512i low = scaled(_mm512_unpacklo_epi8(luma, zero));
    const __m512i high = scaled(_mm512_unpackhi_epi8(luma, zero));
    const __m512i chroma_u = chroma_of(u);
    const __m512i chroma_v = chroma_of(v);
    const auto add = [&](uint8_t* to, __m512i chroma) AVX512 {
        _mm512_storeu_si512(to, _mm512_packus_epi16(_mm512_add_epi16(low, _mm512_unpacklo_epi16(chroma, chroma)),
                                                    _mm512_add_epi16(high, _mm512_unpackhi_epi16(chroma, chroma))));
    };
    add(red, _mm512_mulhi_epi16(chroma_v, k.v_red));
    add(green, _mm512_add_epi16(_mm512_mulhi_epi16(chroma_u, k.u_green), _mm512_mulhi_epi16(chroma_v, k.v_green)));
    add(blue, _mm512_mulhi_epi16(chroma_u, k.u_blue));
}

void AVX512 yuv_row(const uint8_t* y, const uint8_t* u, const uint8_t* v, const YuvCoefficients& c, uint8_t* red,
                    uint8_t* green, uint8_t* blue, int width) {
    const Yuv k = {_mm512_set1_epi16(c.y_offset), _mm512_set1_epi16(c.y),       _mm512_set1_epi16(c.v_red),
                   _mm512_set1_epi16(c.u_green),  _mm512_set1_epi16(c.v_green), _mm512_set1_epi16(c.u_blue)};
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

void AVX512 resize_row(const uint8_t* in, const ResizePlan& plan, uint8_t* out) {
    if (plan.num_vectors == 0) return kAvx2Kernels.resize_row(in, plan, out);
    constexpr __mmask64 kPickedBytes = 0x5555555555555555;
    const __m512i half = _mm512_set1_epi32(1 << (plan.precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(plan.precision);
    const int16_t* weights = plan.pair_weights.data();
    for (int i = 0; i < plan.num_vectors; ++i) {
        const uint8_t* window = in + plan.bases[i];
        const __m512i shuffle = load(plan.shuffles.data() + 64 * i);
        __m512i sums = half;
        for (int pair = 0; pair < plan.num_pairs; ++pair, weights += 32) {
            const __m512i pixels = _mm512_maskz_permutexvar_epi8(kPickedBytes, shuffle, load(window + 2 * pair));
            sums = _mm512_dpwssd_epi32(sums, pixels, load(weights));
        }
        sums = _mm512_max_epi32(_mm512_sra_epi32(sums, shift), _mm512_setzero_si512());
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtusepi32_epi8(sums));
    }
}

void AVX512 blend_rows(const uint8_t* const* rows, const int16_t* weights, int taps, int precision, uint8_t* out,
                       int width) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i half = _mm512_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    for (int x = 0; x < width; x += 64) {
        __m512i sums[4] = {half, half, half, half};
        for (int j = 0; j < taps; j += 2) {
            const bool has_second = j + 1 < taps;
            const uint32_t second_weight = has_second ? static_cast<uint16_t>(weights[j + 1]) : 0;
            const uint32_t both_weights = static_cast<uint16_t>(weights[j]) | second_weight << 16;
            const __m512i pair = _mm512_set1_epi32(static_cast<int>(both_weights));
            const __m512i first = load(rows[j] + x);
            const __m512i second = load(rows[has_second ? j + 1 : j] + x);
            const __m512i low = _mm512_unpacklo_epi8(first, second);
            const __m512i high = _mm512_unpackhi_epi8(first, second);
            sums[0] = _mm512_dpwssd_epi32(sums[0], _mm512_unpacklo_epi8(low, zero), pair);
            sums[1] = _mm512_dpwssd_epi32(sums[1], _mm512_unpackhi_epi8(low, zero), pair);
            sums[2] = _mm512_dpwssd_epi32(sums[2], _mm512_unpacklo_epi8(high, zero), pair);
            sums[3] = _mm512_dpwssd_epi32(sums[3], _mm512_unpackhi_epi8(high, zero), pair);
        }
        for (__m512i& sum : sums) sum = _mm512_sra_epi32(sum, shift);
        _mm512_storeu_si512(
            out + x, _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3])));
    }
}

__m512 AVX512 normalised(const uint8_t* in, __mmask16 lanes, __m512 mean, __m512 std) {
    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, in)));
    return _mm512_div_ps(_mm512_sub_ps(values, mean), std);
}

__mmask16 AVX512 lanes_left(int size, int x) {
    return static_cast<__mmask16>(size - x >= 16 ? 0xffff : (1 << (size - x)) - 1);
}

void AVX512 normalise_float32(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    const __m512 means = _mm512_set1_ps(mean);
    const __m512 stds = _mm512_set1_ps(std);
    float* values = static_cast<float*>(out);
    for (int y = 0; y < size; ++y, in += stride, values += size) {
        for (int x = 0; x < size; x += 16) {
            const __mmask16 lanes = lanes_left(size, x);
            _mm512_mask_storeu_ps(values + x, lanes, normalised(in + x, lanes, means, stds));
        }
    }
}

__m256i AVX512 to_bfloat16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

void AVX512 normalise_bfloat16(const uint8_t* in, ptrdiff_t stride, int size, float mean, float std, void* out) {
    const __m512 means = _mm512_set1_ps(mean);
    const __m512 stds = _mm512_set1_ps(std);
    uint16_t* values = static_cast<uint16_t*>(out);
    for (int y = 0; y < size; ++y, in += stride, values += size) {
        for (int x = 0; x < size; x += 16) {
            const __mmask16 lanes = lanes_left(size, x);
            _mm256_mask_storeu_epi16(values + x, lanes, to_bfloat16(normalised(in + x, lanes, means, stds)));
        }
    }
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512",   {16, 16, 64},      yuv_row,           resize_row,
                                blend_rows, normalise_float32, normalise_bfloat16};

}  // namespace video

#endif
