#include "patches.h"

#include <algorithm>
#include <cstring>

namespace video {

PatchWriter::PatchWriter(const PatchLayout& layout, Orientation orientation, const Kernels& kernels)
    : layout_(layout), kernels_(kernels), source_(orientation, kernels), stride_((layout.width + 63) / 64 * 64) {
    block_.resize(size_t{3} * layout.patch_size * stride_ + kRowPadding);
}

Status PatchWriter::write(const AVFrame& frame, const std::vector<int32_t>& slots) {
    if (Status set = source_.set(frame); !set.ok()) return set;
    prepare();
    for (int patch_y = 0; patch_y < layout_.height / layout_.patch_size; ++patch_y) {
        for (int y = 0; y < layout_.patch_size; ++y) {
            make_row(patch_y * layout_.patch_size + y, block_.data() + size_t{3} * y * stride_);
        }
        for (int32_t slot : slots) write_patch_row(patch_y, slot);
    }
    return {};
}

void PatchWriter::prepare() {
    next_row_ = 0;
    if (horizontal_.in_size != source_.width()) {
        horizontal_ = ResizePlan(source_.width(), layout_.width, kernels_.grouping);
    }
    if (vertical_.in_size == source_.height()) return;
    vertical_ = ResizePlan(source_.height(), layout_.height, {});
    num_kept_ = *std::max_element(vertical_.taps.begin(), vertical_.taps.end());
    kept_.resize(size_t{3} * num_kept_ * stride_ + kRowPadding);
    window_.resize(num_kept_);
}

void PatchWriter::make_row(int y, uint8_t* out) {
    if (source_.height() == layout_.height) return narrow_row(y, out);
    const int first = vertical_.first[y];
    const int taps = vertical_.taps[y];
    const auto kept = [this](int row) { return kept_.data() + size_t{3} * (row % num_kept_) * stride_; };
    for (next_row_ = std::max(next_row_, first); next_row_ < first + taps; ++next_row_) {
        narrow_row(next_row_, kept(next_row_));
    }
    for (int i = 0; i < taps; ++i) window_[i] = kept(first + i);
    kernels_.blend_rows(window_.data(), vertical_.weights_of(y), taps, vertical_.precision, out, 3 * stride_);
}

void PatchWriter::narrow_row(int y, uint8_t* out) {
    if (source_.width() == layout_.width) return source_.copy_row(y, out, stride_);
    const RgbSource::Row row = source_.row(y);
    for (int c = 0; c < 3; ++c) kernels_.resize_row(row.channels[c], horizontal_, out + c * stride_);
}

void PatchWriter::write_patch_row(int patch_y, int32_t slot) const {
    const int merge = layout_.merge_size;
    const int size = layout_.patch_size;
    const int64_t blocks_per_row = layout_.width / size / merge;
    const int64_t patch_bytes = layout_.patch_bytes();
    uint8_t* grid = layout_.out + slot / layout_.temporal_patch_size * layout_.grid_bytes() +
                    slot % layout_.temporal_patch_size * patch_bytes;
    for (int patch_x = 0; patch_x < layout_.width / size; ++patch_x) {
        const int64_t block = patch_y / merge * blocks_per_row + patch_x / merge;
        const int64_t patch = (block * merge + patch_y % merge) * merge + patch_x % merge;
        for (int c = 0; c < 3; ++c) {
            const uint8_t* from = block_.data() + c * stride_ + patch_x * size;
            uint8_t* to = grid + patch * layout_.row_bytes() + c * layout_.temporal_patch_size * patch_bytes;
            const ptrdiff_t row_stride = ptrdiff_t{3} * stride_;
            switch (layout_.dtype) {
                case DType::kUint8:
                    for (int y = 0; y < size; ++y) std::memcpy(to + y * size, from + y * row_stride, size);
                    break;
                case DType::kBfloat16:
                    kernels_.normalise_bfloat16(from, row_stride, size, layout_.mean[c], layout_.std[c], to);
                    break;
                case DType::kFloat32:
                    kernels_.normalise_float32(from, row_stride, size, layout_.mean[c], layout_.std[c], to);
                    break;
            }
        }
    }
}

}  // namespace video
