#include "nvdec.h"

#include <unistd.h>

#include <algorithm>

namespace video {
namespace {

std::string size_text(int64_t width, int64_t height) { return std::to_string(width) + " x " + std::to_string(height); }

}  // namespace

cudaVideoCodec nvdec_codec(AVCodecID codec) {
    switch (codec) {
        case AV_CODEC_ID_MPEG2VIDEO: return cudaVideoCodec_MPEG2;
        case AV_CODEC_ID_H264: return cudaVideoCodec_H264;
        case AV_CODEC_ID_HEVC: return cudaVideoCodec_HEVC;
        case AV_CODEC_ID_VP8: return cudaVideoCodec_VP8;
        case AV_CODEC_ID_VP9: return cudaVideoCodec_VP9;
        case AV_CODEC_ID_AV1: return cudaVideoCodec_AV1;
        default: return cudaVideoCodec_NumCodecs;
    }
}

Status Nvdec::open(int ordinal, const std::string& libcuda, const std::string& libnvcuvid,
                   std::unique_ptr<Nvdec>* nvdec) {
    std::unique_ptr<Nvdec> opened(new Nvdec);
    Status status = NvdecDriver::load(libcuda, libnvcuvid, &opened->driver_);
    const NvdecDriver& driver = opened->driver_;
    if (status.ok()) status = driver.check(driver.cuInit(0), "cuInit");
    if (status.ok()) status = driver.check(driver.cuDeviceGet(&opened->device_, ordinal), "cuDeviceGet");
    if (status.ok()) {
        const CUresult result = driver.cuDevicePrimaryCtxRetain(&opened->context_, opened->device_);
        status = driver.check(result, "cuDevicePrimaryCtxRetain");
        if (!status.ok()) opened->context_ = nullptr;
    }
    opened->process_ = getpid();
    if (status.ok()) *nvdec = std::move(opened);
    return status;
}

Nvdec::~Nvdec() {
    if (!context_) return;
    if (!is_usable()) {
        for (auto& engine : idle_) engine.release();  // nothing of the driver works in a fork, not even its end
        return;
    }
    {
        const Current current(*this);
        idle_.clear();
    }
    driver_.cuDevicePrimaryCtxRelease(device_);
}

bool Nvdec::is_usable() const { return getpid() == process_; }

Status Nvdec::check(AVCodecID codec_id, int bit_depth, int width, int height) {
    const std::string name = avcodec_get_name(codec_id);
    const cudaVideoCodec codec = nvdec_codec(codec_id);
    if (codec == cudaVideoCodec_NumCodecs) return {Code::kUnsupported, "no " + name + " in hardware"};
    CUVIDDECODECAPS can = {};
    if (Status asked = caps(codec, bit_depth, &can); !asked.ok()) return asked;
    const int format = bit_depth > 8 ? cudaVideoSurfaceFormat_P016 : cudaVideoSurfaceFormat_NV12;
    if (!can.bIsSupported || !(can.nOutputFormatMask >> format & 1)) {
        return {Code::kUnsupported, "no " + std::to_string(bit_depth) + "-bit " + name + " on this GPU"};
    }
    if (width < can.nMinWidth || height < can.nMinHeight) {
        return {Code::kUnsupported, size_text(width, height) + " is under the " +
                                        size_text(can.nMinWidth, can.nMinHeight) + " of " + name + " on this GPU"};
    }
    const int64_t blocks = int64_t{(width + 15) / 16} * ((height + 15) / 16);
    if (width > static_cast<int64_t>(can.nMaxWidth) || height > static_cast<int64_t>(can.nMaxHeight) ||
        blocks > can.nMaxMBCount) {
        return {Code::kUnsupported, size_text(width, height) + " is over the " +
                                        size_text(can.nMaxWidth, can.nMaxHeight) + " of " + name + " on this GPU"};
    }
    return {};
}

int Nvdec::num_engines() {
    CUVIDDECODECAPS can = {};
    return caps(cudaVideoCodec_H264, 8, &can).ok() ? can.nNumNVDECs : 0;
}

Status Nvdec::caps(cudaVideoCodec codec, int bit_depth, CUVIDDECODECAPS* caps) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = caps_.find({codec, bit_depth});
    if (known != caps_.end()) {
        *caps = known->second;
        return {};
    }
    const Current current(*this);
    if (!current.status().ok()) return current.status();
    *caps = {};
    caps->eCodecType = codec;
    caps->eChromaFormat = cudaVideoChromaFormat_420;
    caps->nBitDepthMinus8 = bit_depth - 8;
    Status asked = driver_.check(driver_.cuvidGetDecoderCaps(caps), "cuvidGetDecoderCaps");
    if (asked.ok()) caps_[{codec, bit_depth}] = *caps;
    return asked;
}

std::unique_ptr<NvdecEngine> Nvdec::borrow(cudaVideoCodec codec, int limit) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto same = std::find_if(idle_.begin(), idle_.end(), [&](const auto& e) { return e->codec() == codec; });
    if (idle_.empty() || (same == idle_.end() && num_open_ < limit)) {
        ++num_open_;
        return std::make_unique<NvdecEngine>(driver_);
    }
    const auto chosen = same == idle_.end() ? idle_.begin() : same;
    std::unique_ptr<NvdecEngine> engine = std::move(*chosen);
    idle_.erase(chosen);
    return engine;
}

void Nvdec::give_back(std::unique_ptr<NvdecEngine> engine, bool has_failed) {
    if (has_failed) engine.reset();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (engine) {
        idle_.push_back(std::move(engine));
    } else {
        --num_open_;
    }
}

Nvdec::Current::Current(const Nvdec& nvdec) : nvdec_(nvdec) {
    status_ = nvdec.driver_.check(nvdec.driver_.cuCtxPushCurrent_v2(nvdec.context_), "cuCtxPushCurrent");
}

Nvdec::Current::~Current() {
    CUcontext popped = nullptr;
    if (status_.ok()) nvdec_.driver_.cuCtxPopCurrent_v2(&popped);
}

}  // namespace video
