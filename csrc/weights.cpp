#include "weights.h"

#include <algorithm>
#include <cmath>

namespace video {
namespace {

constexpr int kMaxPrecision = 22;
constexpr int kRowStrideStep = 16;

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}

int round_up(int value, int step) { return (value + step - 1) / step * step; }

int precision_for(double largest_weight) {
    int precision = 0;
    while (precision < kMaxPrecision && static_cast<int>(0.5 + largest_weight * (1 << (precision + 1))) < 1 << 15) {
        ++precision;
    }
    return precision;
}

int16_t fixed_point(double weight, int precision) {
    const double scaled = weight * (1 << precision);
    return static_cast<int16_t>(static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
}

}  // namespace

ResizePlan::ResizePlan(int in_size, int out_size, const Grouping& grouping) : in_size(in_size), out_size(out_size) {
    const double scale = static_cast<double>(in_size) / out_size;
    const double stretch = std::max(scale, 1.0);
    const double support = 2.0 * stretch;
    const int max_taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    row_stride = round_up(max_taps, kRowStrideStep);
    first.resize(out_size);
    taps.resize(out_size);
    std::vector<double> exact(static_cast<size_t>(out_size) * row_stride);
    double largest = 0.0;
    for (int i = 0; i < out_size; ++i) {
        const double center = scale * (i + 0.5);
        first[i] = std::max(static_cast<int>(center - support + 0.5), 0);
        taps[i] = std::clamp(std::min(static_cast<int>(center + support + 0.5), in_size) - first[i], 0, max_taps);
        double* row = exact.data() + static_cast<size_t>(i) * row_stride;
        double total = 0.0;
        for (int j = 0; j < taps[i]; ++j) total += row[j] = bicubic((j + first[i] - center + 0.5) / stretch);
        for (int j = 0; j < taps[i]; ++j) largest = std::max(largest, row[j] /= total);
    }
    precision = precision_for(largest);
    weights.resize(exact.size());
    std::transform(exact.begin(), exact.end(), weights.begin(),
                   [this](double weight) { return fixed_point(weight, precision); });
    if (grouping.outputs_per_vector > 0) group(grouping);
}

void ResizePlan::group(const Grouping& grouping) {
    const int lanes = grouping.outputs_per_vector;
    const int per_base = grouping.outputs_per_base;
    num_vectors = round_up(out_size, lanes) / lanes;
    num_pairs = (*std::max_element(taps.begin(), taps.end()) + 1) / 2;
    bases.resize(static_cast<size_t>(num_vectors) * (lanes / per_base));
    shuffles.assign(static_cast<size_t>(num_vectors) * lanes * 4, 0x80);
    pair_weights.resize(static_cast<size_t>(num_vectors) * num_pairs * lanes * 2);
    for (int i = 0; i < num_vectors * lanes; ++i) {
        const int output = std::min(i, out_size - 1);  // lanes past the end repeat the last output
        const int base = first[std::min(i / per_base * per_base, out_size - 1)];
        const int offset = first[output] - base;
        if (offset + 2 > grouping.window) {
            num_vectors = 0;
            return;
        }
        bases[i / per_base] = base;
        shuffles[static_cast<size_t>(i) * 4] = static_cast<uint8_t>(offset);
        shuffles[static_cast<size_t>(i) * 4 + 2] = static_cast<uint8_t>(offset + 1);
        int16_t* vector = pair_weights.data() + static_cast<size_t>(i / lanes) * num_pairs * lanes * 2;
        for (int pair = 0; pair < num_pairs; ++pair) {
            for (int half = 0; half < 2; ++half) {
                vector[(pair * lanes + i % lanes) * 2 + half] = weights_of(output)[pair * 2 + half];
            }
        }
    }
}

}  // namespace video
