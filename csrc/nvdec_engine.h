// One hardware decoder: opened for the first stream, then reconfigured for one after the other.
#pragma once

#include <array>

#include "nvdec_driver.h"

namespace video {

// A decoded picture and the part of it that is shown.
struct NvdecPicture {
    int index = 0;
    CUVIDPROCPARAMS processing = {};
    int left = 0;
    int top = 0;
    int width = 0;
    int height = 0;
};

// Where a picture goes: luma rows, then rows of interleaved chroma, both `pitch` bytes apart.
struct Surface {
    CUdeviceptr data = 0;
    size_t pitch = 0;
};

// For one thread at a time, with the GPU current.
class NvdecEngine {
public:
    explicit NvdecEngine(const NvdecDriver& driver) : driver_(driver) {}
    ~NvdecEngine();
    NvdecEngine(const NvdecEngine&) = delete;

    cudaVideoCodec codec() const { return created_.CodecType; }
    int num_surfaces() const { return static_cast<int>(created_.ulNumDecodeSurfaces); }

    // Whether such a stream needs no change of the decoder.
    bool is_ready_for(const CUVIDEOFORMAT& format) const;
    // Opens or reconfigures the decoder; pictures are decoded at their coded size, as the driver's scaler is not exact.
    Status prepare(const CUVIDEOFORMAT& format);
    Status decode(CUVIDPICPARAMS* picture);
    // cuvidDecodeStatus_Invalid where the driver does not tell.
    cuvidDecodeStatus status(int picture) const;

    // Copies the shown part of a picture, in the order of `stream`.
    Status copy(const NvdecPicture& picture, const Surface& to, CUstream stream);
    // Waits for the copies, so that pictures may be decoded over.
    Status finish_copies();

private:
    // A picture that a copy reads from.
    struct Mapped {
        CUdeviceptr data = 0;
        CUevent copied = nullptr;
    };

    bool is_kind(const CUVIDEOFORMAT& format) const;
    Status create(const CUVIDEOFORMAT& format);
    Status reconfigure(const CUVIDEOFORMAT& format);
    Status enqueue(const NvdecPicture& picture, CUdeviceptr from, size_t from_pitch, const Surface& to,
                   CUstream stream) const;
    Status finish(Mapped* mapped);
    void destroy();

    const NvdecDriver& driver_;
    CUvideodecoder decoder_ = nullptr;
    CUVIDDECODECREATEINFO created_ = {};
    std::array<Mapped, 2> mapped_;
    size_t next_mapped_ = 0;
};

}  // namespace video
