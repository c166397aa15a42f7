#include "nvdec_batch.h"

#include "nvdec_decoder.h"
#include "pool.h"

namespace video {
namespace {

// 0 for a format that the hardware has no surface for.
int bit_depth_of(int pixel_format) {
    switch (pixel_format) {
        case AV_PIX_FMT_YUV420P:
        case AV_PIX_FMT_YUVJ420P: return 8;
        case AV_PIX_FMT_YUV420P10LE: return 10;
        case AV_PIX_FMT_YUV420P12LE: return 12;
        default: return 0;
    }
}

PictureKind look_at_frame(const AVFrame& frame, const Index& index, Nvdec& nvdec) {
    PictureKind kind;
    kind.bit_depth = bit_depth_of(frame.format);
    if (kind.bit_depth == 0) {
        const char* name = av_get_pix_fmt_name(static_cast<AVPixelFormat>(frame.format));
        kind.status = {Code::kUnsupported, std::string("pixel format ") + (name ? name : "unknown")};
    } else if (frame.width != index.width || frame.height != index.height) {
        kind.status = {Code::kUnsupported, "the size of its pictures changes"};
    } else {
        const bool full_range = frame.color_range == AVCOL_RANGE_JPEG || frame.format == AV_PIX_FMT_YUVJ420P;
        kind.coefficients = yuv_coefficients(frame.colorspace, full_range);
        const AVCodecDescriptor* codec = avcodec_descriptor_get_by_name(index.codec.c_str());
        kind.status = nvdec.check(codec ? codec->id : AV_CODEC_ID_NONE, kind.bit_depth, index.width, index.height);
    }
    return kind;
}

PictureKind look_at_file(const Index& index, const Limits& limits, const Watch& watch, Nvdec& nvdec) {
    PictureKind kind;
    kind.status = {Code::kUnsupported, "its first frame does not decode"};
    if (!index.has_times) {
        kind.status.message = "its packets have no times of their own";
        return kind;
    }
    if (index.num_restarts() > 0) {
        kind.status.message = "its clock starts again";
        return kind;
    }
    if (index.shown.empty()) return kind;
    std::vector<FrameState> states;
    FrameReader reader(index, limits, watch);
    const auto take = [&](const AVFrame& frame, size_t) -> Status {
        kind = look_at_frame(frame, index, nvdec);
        return {};
    };
    const Status read = reader.read({0}, take, &states);
    if (read.code == Code::kDeadline || read.code == Code::kCancelled) kind.status = read;
    return kind;
}

void decode_unit(const DecodeRequest& request, int bit_depth, const CallOptions& options, Nvdec& nvdec,
                 CUstream stream, const Watch& watch, Unit* unit) {
    const Nvdec::Current current(nvdec);
    if (!current.status().ok()) {
        unit->status = current.status();
        return;
    }
    const AVCodecDescriptor* codec = avcodec_descriptor_get_by_name(request.index->codec.c_str());
    const cudaVideoCodec kind = nvdec_codec(codec ? codec->id : AV_CODEC_ID_NONE);
    std::unique_ptr<NvdecEngine> engine = nvdec.borrow(kind, options.num_threads);
    const SurfaceShape shape(*request.index, bit_depth);
    const auto out = reinterpret_cast<CUdeviceptr>(request.layout.out);
    const auto open = [&](const AVStream* stream_info, const Limits&, std::unique_ptr<Decoder>* decoder) {
        return NvdecDecoder::open(stream_info, *request.index, watch, nvdec.driver(), engine.get(), decoder);
    };
    const auto take = [&](const AVFrame& frame, size_t place) -> Status {
        const auto& picture = *static_cast<const NvdecPicture*>(frame.opaque);
        const auto slot = static_cast<CUdeviceptr>(unit->slots[place].front());
        return engine->copy(picture, {out + slot * shape.bytes(), static_cast<size_t>(shape.pitch)}, stream);
    };
    {
        FrameReader reader(*request.index, options.limits, watch, open);
        unit->status = reader.read(unit->frames, take, &unit->states);
        unit->counts = reader.counts();
    }
    const Status finished = engine->finish_copies();
    if (unit->status.ok()) unit->status = finished;
    nvdec.give_back(std::move(engine), unit->status.code == Code::kUnsupported);
}

}  // namespace

std::vector<PictureKind> look_at_pictures(const std::vector<std::shared_ptr<const Index>>& indexes,
                                          const std::vector<double>& deadlines_s, CallOptions& options, Nvdec& nvdec) {
    std::vector<PictureKind> kinds(indexes.size());
    std::vector<std::function<void()>> tasks;
    for (size_t i = 0; i < indexes.size(); ++i) {
        tasks.emplace_back([&, i] {
            Watch watch(options.cancelled);
            watch.start(deadlines_s[i]);
            try {
                kinds[i] = look_at_file(*indexes[i], options.limits, watch, nvdec);
            } catch (const std::bad_alloc&) {
                kinds[i].status = out_of_memory();
            }
        });
    }
    run_tasks(tasks, options.num_threads, options.poll);
    return kinds;
}

std::vector<DecodeResult> decode_surfaces(const std::vector<DecodeRequest>& requests,
                                          const std::vector<int>& bit_depths, CallOptions& options, Nvdec& nvdec,
                                          CUstream stream) {
    const DecodeUnit decode = [&](const DecodeRequest& request, Watch& watch, Unit* unit) {
        decode_unit(request, bit_depths[unit->request], options, nvdec, stream, watch, unit);
    };
    return decode_units(requests, options, decode);
}

}  // namespace video
