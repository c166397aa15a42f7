// Weights of one pass of the antialiased bicubic resize, as torch computes them for uint8.
#pragma once

#include <cstdint>
#include <vector>

namespace video {

// Rows of pixels are allocated with this many bytes more than they hold, so that vectors may run over.
constexpr int kRowPadding = 128;

// How a SIMD level groups the outputs of the horizontal pass. Each base is the first input byte of a window that one
// load covers; the outputs that share it pick their inputs from that window.
struct Grouping {
    int outputs_per_vector = 0;  // 0: not vectorised over outputs
    int outputs_per_base = 0;
    int window = 0;  // bytes that one load covers
};

struct ResizePlan {
    ResizePlan() = default;
    ResizePlan(int in_size, int out_size, const Grouping& grouping);

    int in_size = 0;
    int out_size = 0;
    int precision = 0;   // weights are fixed point with this many fractional bits
    int row_stride = 0;  // weights between two outputs, zero after the taps
    std::vector<int32_t> first;  // first input of each output
    std::vector<int32_t> taps;   // inputs of each output
    std::vector<int16_t> weights;

    const int16_t* weights_of(int output) const { return weights.data() + int64_t{output} * row_stride; }

    // The same by vectors of outputs; empty when some outputs that share a base lie too far apart.
    int num_vectors = 0;
    int num_pairs = 0;                  // pairs of taps, the same for all vectors
    std::vector<int32_t> bases;         // [num_vectors][outputs_per_vector / outputs_per_base]
    std::vector<uint8_t> shuffles;      // [num_vectors][outputs_per_vector * 4]: bytes 0 and 2 of each 32-bit lane
    std::vector<int16_t> pair_weights;  // [num_vectors][num_pairs][outputs_per_vector * 2]

private:
    void group(const Grouping& grouping);
};

}  // namespace video
