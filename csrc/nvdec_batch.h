// The two calls for decoding on a GPU: look at files, and decode chosen frames of them into surfaces.
#pragma once

#include "batch.h"
#include "color.h"
#include "nvdec.h"

namespace video {

// What the pictures of a file are; a file that the GPU does not decode has kUnsupported, with the reason.
struct PictureKind {
    Status status;
    int bit_depth = 8;
    YuvCoefficients coefficients = {};
};

// Decodes the first frame of each file on the processor: its colours are what the processor's path takes them for.
std::vector<PictureKind> look_at_pictures(const std::vector<std::shared_ptr<const Index>>& indexes,
                                          const std::vector<double>& deadlines_s, CallOptions& options, Nvdec& nvdec);

// Rows and bytes per row of a surface: height rounded up to even, then half as many rows of chroma.
struct SurfaceShape {
    int64_t rows;
    int64_t pitch;

    SurfaceShape(const Index& index, int bit_depth)
        : rows((index.height + 1) / 2 * 3), pitch((index.width + 1) / 2 * (bit_depth > 8 ? 4 : 2)) {}
    int64_t bytes() const { return rows * pitch; }
};

// Of each request the frames (ascending, distinct) are copied one after the other to `layout.out`, on the GPU, in the
// order of `stream`; the rest of the layout is not looked at. A request with any status but ok, or any frame that is
// not good, has to be decoded elsewhere.
std::vector<DecodeResult> decode_surfaces(const std::vector<DecodeRequest>& requests,
                                          const std::vector<int>& bit_depths, CallOptions& options, Nvdec& nvdec,
                                          CUstream stream);

}  // namespace video
