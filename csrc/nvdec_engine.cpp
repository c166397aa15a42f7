#include "nvdec_engine.h"

#include <algorithm>

namespace video {
namespace {

// Pictures beyond those that the stream refers to, so that decoding goes on while others are copied.
constexpr int kSpareSurfaces = 4;

template <typename Info>
void set_size(const CUVIDEOFORMAT& format, Info* info) {
    info->ulWidth = info->ulTargetWidth = format.coded_width;
    info->ulHeight = info->ulTargetHeight = format.coded_height;
    info->display_area.right = static_cast<short>(format.coded_width);
    info->display_area.bottom = static_cast<short>(format.coded_height);
}

size_t even(int value) { return static_cast<size_t>(value + value % 2); }

}  // namespace

NvdecEngine::~NvdecEngine() { destroy(); }

void NvdecEngine::destroy() {
    (void)finish_copies();
    for (Mapped& mapped : mapped_) {
        if (mapped.copied) driver_.cuEventDestroy_v2(mapped.copied);
        mapped.copied = nullptr;
    }
    if (decoder_) driver_.cuvidDestroyDecoder(decoder_);
    decoder_ = nullptr;
}

bool NvdecEngine::is_kind(const CUVIDEOFORMAT& format) const {
    return decoder_ && created_.CodecType == format.codec && created_.bitDepthMinus8 == format.bit_depth_luma_minus8 &&
           num_surfaces() >= format.min_num_decode_surfaces + kSpareSurfaces;
}

bool NvdecEngine::is_ready_for(const CUVIDEOFORMAT& format) const {
    return is_kind(format) && created_.ulWidth == format.coded_width && created_.ulHeight == format.coded_height;
}

Status NvdecEngine::prepare(const CUVIDEOFORMAT& format) {
    if (is_ready_for(format)) return {};
    const bool fits = created_.ulMaxWidth >= format.coded_width && created_.ulMaxHeight >= format.coded_height;
    if (is_kind(format) && fits && reconfigure(format).ok()) return {};
    return create(format);
}

Status NvdecEngine::create(const CUVIDEOFORMAT& format) {
    destroy();
    CUVIDDECODECREATEINFO info = {};
    set_size(format, &info);
    info.ulMaxWidth = format.coded_width;
    info.ulMaxHeight = format.coded_height;
    if (created_.CodecType == format.codec) {
        // Room for the largest stream so far: the sizes of a data set come again.
        info.ulMaxWidth = std::max(info.ulMaxWidth, created_.ulMaxWidth);
        info.ulMaxHeight = std::max(info.ulMaxHeight, created_.ulMaxHeight);
    }
    info.ulNumDecodeSurfaces = format.min_num_decode_surfaces + kSpareSurfaces;
    info.ulNumOutputSurfaces = mapped_.size();
    info.CodecType = format.codec;
    info.ChromaFormat = format.chroma_format;
    info.bitDepthMinus8 = format.bit_depth_luma_minus8;
    info.OutputFormat = format.bit_depth_luma_minus8 > 0 ? cudaVideoSurfaceFormat_P016 : cudaVideoSurfaceFormat_NV12;
    info.DeinterlaceMode = cudaVideoDeinterlaceMode_Weave;
    info.ulCreationFlags = cudaVideoCreate_PreferCUVID;
    created_ = {};
    Status status = driver_.check(driver_.cuvidCreateDecoder(&decoder_, &info), "cuvidCreateDecoder");
    if (!status.ok()) {
        decoder_ = nullptr;
        return status;
    }
    created_ = info;
    for (Mapped& mapped : mapped_) {
        status = driver_.check(driver_.cuEventCreate(&mapped.copied, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
        if (!status.ok()) return status;
    }
    return {};
}

Status NvdecEngine::reconfigure(const CUVIDEOFORMAT& format) {
    if (Status finished = finish_copies(); !finished.ok()) return finished;
    CUVIDRECONFIGUREDECODERINFO info = {};
    set_size(format, &info);
    info.ulNumDecodeSurfaces = num_surfaces();
    Status status = driver_.check(driver_.cuvidReconfigureDecoder(decoder_, &info), "cuvidReconfigureDecoder");
    if (status.ok()) set_size(format, &created_);
    return status;
}

Status NvdecEngine::decode(CUVIDPICPARAMS* picture) {
    return driver_.check(driver_.cuvidDecodePicture(decoder_, picture), "cuvidDecodePicture");
}

cuvidDecodeStatus NvdecEngine::status(int picture) const {
    CUVIDGETDECODESTATUS status = {};
    const bool is_known = driver_.cuvidGetDecodeStatus(decoder_, picture, &status) == CUDA_SUCCESS;
    return is_known ? status.decodeStatus : cuvidDecodeStatus_Invalid;
}

Status NvdecEngine::copy(const NvdecPicture& picture, const Surface& to, CUstream stream) {
    Mapped& mapped = mapped_[next_mapped_];
    next_mapped_ = (next_mapped_ + 1) % mapped_.size();
    if (Status finished = finish(&mapped); !finished.ok()) return finished;
    CUVIDPROCPARAMS processing = picture.processing;
    processing.output_stream = stream;
    unsigned int pitch = 0;
    CUdeviceptr data = 0;
    const CUresult result = driver_.cuvidMapVideoFrame64(decoder_, picture.index, &data, &pitch, &processing);
    if (Status status = driver_.check(result, "cuvidMapVideoFrame"); !status.ok()) return status;
    mapped.data = data;
    Status status = enqueue(picture, mapped.data, pitch, to, stream);
    if (status.ok()) status = driver_.check(driver_.cuEventRecord(mapped.copied, stream), "cuEventRecord");
    if (!status.ok()) {
        driver_.cuStreamSynchronize(stream);
        driver_.cuvidUnmapVideoFrame64(decoder_, mapped.data);
        mapped.data = 0;
    }
    return status;
}

Status NvdecEngine::enqueue(const NvdecPicture& picture, CUdeviceptr from, size_t from_pitch, const Surface& to,
                            CUstream stream) const {
    const size_t sample_bytes = created_.bitDepthMinus8 > 0 ? 2 : 1;
    CUDA_MEMCPY2D plane = {};
    plane.srcMemoryType = plane.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    plane.srcDevice = from;
    plane.srcPitch = from_pitch;
    plane.srcXInBytes = picture.left * sample_bytes;
    plane.srcY = picture.top;
    plane.dstDevice = to.data;
    plane.dstPitch = to.pitch;
    plane.WidthInBytes = even(picture.width) * sample_bytes;
    plane.Height = even(picture.height);
    Status status = driver_.check(driver_.cuMemcpy2DAsync_v2(&plane, stream), "cuMemcpy2DAsync");
    if (!status.ok()) return status;
    plane.srcDevice = from + from_pitch * even(static_cast<int>(created_.ulTargetHeight));
    plane.srcY = picture.top / 2;
    plane.dstDevice = to.data + to.pitch * even(picture.height);
    plane.Height = even(picture.height) / 2;
    return driver_.check(driver_.cuMemcpy2DAsync_v2(&plane, stream), "cuMemcpy2DAsync");
}

Status NvdecEngine::finish_copies() {
    Status status;
    for (Mapped& mapped : mapped_) {
        if (Status finished = finish(&mapped); status.ok()) status = finished;
    }
    return status;
}

Status NvdecEngine::finish(Mapped* mapped) {
    if (!mapped->data) return {};
    Status status = driver_.check(driver_.cuEventSynchronize(mapped->copied), "cuEventSynchronize");
    const CUresult unmapped = driver_.cuvidUnmapVideoFrame64(decoder_, mapped->data);
    mapped->data = 0;
    return status.ok() ? driver_.check(unmapped, "cuvidUnmapVideoFrame") : status;
}

}  // namespace video
