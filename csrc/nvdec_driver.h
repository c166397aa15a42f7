// The functions of libcuda and libnvcuvid that decoding uses, found at run time: neither is needed to build or import.
#pragma once

#include <ffnvcodec/dynlink_cuda.h>
#include <ffnvcodec/dynlink_cuviddec.h>
#include <ffnvcodec/dynlink_nvcuvid.h>

#include <memory>
#include <string>

#include "status.h"

#define VIDEO_CUDA_FUNCTIONS(USE) \
    USE(cuInit)                   \
    USE(cuDeviceGet)              \
    USE(cuDevicePrimaryCtxRetain) \
    USE(cuDevicePrimaryCtxRelease) \
    USE(cuCtxPushCurrent_v2)      \
    USE(cuCtxPopCurrent_v2)       \
    USE(cuMemcpy2DAsync_v2)       \
    USE(cuStreamSynchronize)      \
    USE(cuEventCreate)            \
    USE(cuEventRecord)            \
    USE(cuEventSynchronize)       \
    USE(cuEventDestroy_v2)        \
    USE(cuGetErrorName)
#define VIDEO_CUVID_FUNCTIONS(USE) \
    USE(cuvidGetDecoderCaps)       \
    USE(cuvidCreateVideoParser)    \
    USE(cuvidParseVideoData)       \
    USE(cuvidDestroyVideoParser)   \
    USE(cuvidCreateDecoder)        \
    USE(cuvidReconfigureDecoder)   \
    USE(cuvidDestroyDecoder)       \
    USE(cuvidDecodePicture)        \
    USE(cuvidGetDecodeStatus)      \
    USE(cuvidMapVideoFrame64)      \
    USE(cuvidUnmapVideoFrame64)

namespace video {

struct NvdecDriver {
#define VIDEO_DECLARE(name) t##name* name = nullptr;
    VIDEO_CUDA_FUNCTIONS(VIDEO_DECLARE)
    VIDEO_CUVID_FUNCTIONS(VIDEO_DECLARE)
#undef VIDEO_DECLARE

    // The libraries stay loaded until the process ends, as the driver wants it. kUnsupported names what is missing.
    static Status load(const std::string& libcuda, const std::string& libnvcuvid, NvdecDriver* driver);

    // Ok for CUDA_SUCCESS; else kUnsupported, with the name of the call and of the error.
    Status check(CUresult result, const char* call) const;
};

}  // namespace video
