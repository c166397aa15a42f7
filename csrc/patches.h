// Decoded frames to rows of patches in the caller's buffer: RGB, resize, normalise and reorder in one pass over rows.
#pragma once

#include <array>
#include <vector>

#include "rgb.h"

namespace video {

enum class DType : uint8_t { kUint8, kBfloat16, kFloat32 };

inline int size_of(DType dtype) { return dtype == DType::kUint8 ? 1 : dtype == DType::kBfloat16 ? 2 : 4; }

// Where the patches of a video go: [grid_t * grid_h * grid_w, 3 * temporal_patch_size * patch_size ^ 2], blocks of
// merge_size x merge_size patches together.
struct PatchLayout {
    int height = 0;  // of the resized frames
    int width = 0;
    int patch_size = 14;
    int temporal_patch_size = 2;
    int merge_size = 2;
    std::array<float, 3> mean = {};  // in units of pixel values
    std::array<float, 3> std = {};
    DType dtype = DType::kFloat32;
    uint8_t* out = nullptr;

    int64_t patch_bytes() const { return int64_t{patch_size} * patch_size * size_of(dtype); }
    int64_t row_bytes() const { return 3 * temporal_patch_size * patch_bytes(); }
    int64_t grid_bytes() const { return int64_t{height / patch_size} * (width / patch_size) * row_bytes(); }
};

class PatchWriter {
public:
    PatchWriter(const PatchLayout& layout, Orientation orientation, const Kernels& kernels);

    // Resizes `frame` and writes it as each of the frames `slots`.
    Status write(const AVFrame& frame, const std::vector<int32_t>& slots);

private:
    void prepare();
    void make_row(int y, uint8_t* out);
    void narrow_row(int y, uint8_t* out);
    void write_patch_row(int patch_y, int32_t slot) const;

    PatchLayout layout_;
    const Kernels& kernels_;
    RgbSource source_;
    ResizePlan horizontal_;
    ResizePlan vertical_;
    int stride_;                          // bytes between channels of a resized row
    int next_row_ = 0;                    // of the source, to be narrowed
    int num_kept_ = 0;                    // narrowed rows that are kept at a time
    std::vector<uint8_t> kept_;           // [num_kept_][3][stride_]: row y is at y % num_kept_
    std::vector<const uint8_t*> window_;  // kept rows of one output row
    std::vector<uint8_t> block_;          // [patch_size][3][stride_] resized rows
};

}  // namespace video
