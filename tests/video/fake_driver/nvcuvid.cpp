// A libnvcuvid that decodes with libavcodec, and is as strict as the interface is documented to be.
//
// Like the real parser it puts the time stamps of pictures that are not yet shown into rising order. A picture that is
// unmapped is overwritten at once, and one decoder used by two threads at a time is counted as "races".
#include "fake.h"

#include <ffnvcodec/dynlink_cuviddec.h>
#include <ffnvcodec/dynlink_nvcuvid.h>

extern "C" {
#include <libavcodec/avcodec.h>
#include <libavutil/pixdesc.h>
}

#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <memory>
#include <vector>

namespace {

constexpr CUresult kInvalidValue = static_cast<CUresult>(1);
constexpr CUresult kMapFailed = static_cast<CUresult>(205);
constexpr CUresult kNotSupported = static_cast<CUresult>(801);
constexpr int kPitchStep = 512;
constexpr unsigned char kOverwritten = 0xA5;
constexpr int kMinSurfaces = 20;

thread_local bool in_sequence_callback = false;

// From the parser to the decoder, through CUVIDPICPARAMS.
struct Picture {
    int64_t timestamp = 0;
    cudaVideoCodec codec = cudaVideoCodec_NumCodecs;
    AVFrame* frame = nullptr;
    bool is_broken = false;
    std::atomic<long> polls{0};
    int surface = 0;

    ~Picture() { av_frame_free(&frame); }
};
using PicturePtr = std::shared_ptr<Picture>;

long setting(const char* name, long otherwise) {
    const long value = fake_get(name);
    return value ? value : otherwise;
}

AVCodecID codec_of(cudaVideoCodec codec) {
    switch (codec) {
        case cudaVideoCodec_MPEG2: return AV_CODEC_ID_MPEG2VIDEO;
        case cudaVideoCodec_H264: return AV_CODEC_ID_H264;
        case cudaVideoCodec_HEVC: return AV_CODEC_ID_HEVC;
        case cudaVideoCodec_VP8: return AV_CODEC_ID_VP8;
        case cudaVideoCodec_VP9: return AV_CODEC_ID_VP9;
        default: return AV_CODEC_ID_NONE;  // as on Hopper: no AV1
    }
}

bool is_supported(cudaVideoCodec codec, int depth_minus_8) {
    if (fake_get("no_engines")) return false;
    return codec_of(codec) != AV_CODEC_ID_NONE && (depth_minus_8 == 0 || codec == cudaVideoCodec_HEVC);
}

struct Parser {
    CUVIDPARSERPARAMS parameters = {};
    AVCodecContext* codec = nullptr;
    CUVIDEOFORMAT format = {};
    int num_surfaces = 0;
    int next_surface = 0;
    std::list<PicturePtr> waiting;  // decoded, not yet shown

    ~Parser() { avcodec_free_context(&codec); }

    bool begin_sequence();
    bool decode_next(int64_t timestamp, bool is_broken);
    bool show_ready();
    bool show(const PicturePtr& picture);
};

bool Parser::begin_sequence() {
    CUVIDEOFORMAT now = {};
    now.codec = parameters.CodecType;
    now.chroma_format = cudaVideoChromaFormat_420;
    const AVPixFmtDescriptor* pixels = av_pix_fmt_desc_get(codec->pix_fmt);
    now.bit_depth_luma_minus8 = now.bit_depth_chroma_minus8 = static_cast<unsigned char>(pixels->comp[0].depth - 8);
    now.min_num_decode_surfaces = static_cast<unsigned char>(setting("min_surfaces", kMinSurfaces));
    now.display_area.left = static_cast<int>(fake_get("crop_left"));
    now.display_area.top = static_cast<int>(fake_get("crop_top"));
    now.display_area.right = now.display_area.left + codec->width;
    now.display_area.bottom = now.display_area.top + codec->height;
    now.coded_width = (now.display_area.right + 15) / 16 * 16 + static_cast<unsigned>(fake_get("coded_extra"));
    now.coded_height = (now.display_area.bottom + 15) / 16 * 16;
    if (std::memcmp(&now, &format, sizeof now) == 0) return true;
    format = now;
    in_sequence_callback = true;
    num_surfaces = parameters.pfnSequenceCallback(parameters.pUserData, &format);
    in_sequence_callback = false;
    return num_surfaces > 0;
}

bool Parser::decode_next(int64_t timestamp, bool is_broken) {
    auto picture = std::make_shared<Picture>();
    picture->timestamp = timestamp;
    picture->codec = parameters.CodecType;
    picture->is_broken = is_broken || fake_get("pictures") + 1 == fake_get("broken_picture");
    fake_add("pictures", 1);
    const auto is_free = [this](int surface) {
        return std::none_of(waiting.begin(), waiting.end(), [&](const auto& p) { return p->surface == surface; });
    };
    picture->surface = next_surface;
    for (int i = 0; i < num_surfaces && !is_free(picture->surface); ++i) {
        picture->surface = (picture->surface + 1) % num_surfaces;
    }
    next_surface = (picture->surface + 1) % num_surfaces;
    waiting.push_back(picture);
    CUVIDPICPARAMS parameters_of = {};
    parameters_of.CurrPicIdx = picture->surface;
    const PicturePtr* address = &picture;
    std::memcpy(parameters_of.CodecSpecific.CodecReserved, &address, sizeof address);
    return parameters.pfnDecodePicture(parameters.pUserData, &parameters_of) != 0;
}

bool Parser::show_ready() {
    AVFrame* frame = av_frame_alloc();
    bool goes_on = true;
    while (goes_on && avcodec_receive_frame(codec, frame) >= 0) {
        const auto found = std::find_if(waiting.begin(), waiting.end(),
                                        [&](const auto& picture) { return picture->timestamp == frame->pts; });
        if (found == waiting.end()) continue;
        const PicturePtr picture = *found;
        if (frame->decode_error_flags || (frame->flags & AV_FRAME_FLAG_CORRUPT)) picture->is_broken = true;
        picture->frame = av_frame_clone(frame);
        goes_on = show(picture);
    }
    av_frame_free(&frame);
    return goes_on;
}

bool Parser::show(const PicturePtr& picture) {
    const auto by_time = [](const auto& a, const auto& b) { return a->timestamp < b->timestamp; };
    const auto earliest = fake_get("mix_up") ? std::max_element(waiting.begin(), waiting.end(), by_time)
                                             : std::min_element(waiting.begin(), waiting.end(), by_time);
    CUVIDPARSERDISPINFO shown = {};
    shown.picture_index = picture->surface;
    shown.progressive_frame = 1;
    std::swap((*earliest)->timestamp, picture->timestamp);
    shown.timestamp = picture->timestamp;
    waiting.remove(picture);
    return parameters.pfnDisplayPicture(parameters.pUserData, &shown) != 0;
}

struct Decoder {
    CUVIDDECODECREATEINFO info = {};
    std::vector<PicturePtr> surfaces;
    std::list<std::vector<unsigned char>> outputs;  // mapped ones and what they left
    unsigned mapped = 0;
    std::atomic<int> users{0};

    unsigned pitch() const {
        const unsigned bytes = static_cast<unsigned>(info.ulTargetWidth) * (info.bitDepthMinus8 ? 2 : 1);
        return (bytes + kPitchStep - 1) / kPitchStep * kPitchStep;
    }
    void fill(const AVFrame& frame, unsigned char* out) const;
};

// One user of a decoder at a time.
class Use {
public:
    explicit Use(CUvideodecoder decoder) : decoder_(*static_cast<Decoder*>(decoder)) {
        if (decoder_.users++ > 0) fake_add("races", 1);
    }
    ~Use() { --decoder_.users; }

private:
    Decoder& decoder_;
};

template <typename Sample>
void fill_samples(const AVFrame& frame, int shift, int left, int top, size_t pitch, size_t chroma_row,
                  unsigned char* out) {
    for (int y = 0; y < frame.height; ++y) {
        auto* row = reinterpret_cast<Sample*>(out + (top + y) * pitch) + left;
        const auto* from = reinterpret_cast<const Sample*>(frame.data[0] + y * frame.linesize[0]);
        for (int x = 0; x < frame.width; ++x) row[x] = static_cast<Sample>(from[x] << shift);
    }
    for (int y = 0; y < (frame.height + 1) / 2; ++y) {
        auto* row = reinterpret_cast<Sample*>(out + (chroma_row + top / 2 + y) * pitch) + left;
        for (int c = 0; c < 2; ++c) {
            const auto* from = reinterpret_cast<const Sample*>(frame.data[1 + c] + y * frame.linesize[1 + c]);
            for (int x = 0; x < (frame.width + 1) / 2; ++x) row[2 * x + c] = static_cast<Sample>(from[x] << shift);
        }
    }
}

void Decoder::fill(const AVFrame& frame, unsigned char* out) const {
    const int left = static_cast<int>(fake_get("crop_left")), top = static_cast<int>(fake_get("crop_top"));
    const size_t chroma_row = (info.ulTargetHeight + 1) / 2 * 2;
    if (info.bitDepthMinus8) {
        const int shift = 8 - static_cast<int>(info.bitDepthMinus8);
        fill_samples<uint16_t>(frame, shift, left, top, pitch(), chroma_row, out);
    } else {
        fill_samples<uint8_t>(frame, 0, left, top, pitch(), chroma_row, out);
    }
}

bool is_unscaled(const CUVIDDECODECREATEINFO& info) {
    return info.ulTargetWidth == info.ulWidth && info.ulTargetHeight == info.ulHeight &&
           info.display_area.right == static_cast<short>(info.ulWidth) &&
           info.display_area.bottom == static_cast<short>(info.ulHeight);
}

}  // namespace

extern "C" {

CUresult cuvidGetDecoderCaps(CUVIDDECODECAPS* caps) {
    if (const CUresult error = fake_call_in_context("cuvidGetDecoderCaps")) return error;
    if (!is_supported(caps->eCodecType, static_cast<int>(caps->nBitDepthMinus8))) return CUDA_SUCCESS;
    caps->bIsSupported = 1;
    caps->nNumNVDECs = static_cast<unsigned char>(setting("engines", 3));
    caps->nOutputFormatMask = caps->nBitDepthMinus8 ? 3 : 1;
    caps->nMinWidth = static_cast<unsigned short>(setting("min_width", 16));
    caps->nMinHeight = static_cast<unsigned short>(setting("min_height", 16));
    caps->nMaxWidth = caps->nMaxHeight = static_cast<unsigned>(setting("max_size", 4096));
    caps->nMaxMBCount = static_cast<unsigned>(setting("max_blocks", 65536));
    return CUDA_SUCCESS;
}

CUresult cuvidCreateVideoParser(CUvideoparser* parser, CUVIDPARSERPARAMS* parameters) {
    if (const CUresult error = fake_call("cuvidCreateVideoParser")) return error;
    auto made = std::make_unique<Parser>();
    made->parameters = *parameters;
    const AVCodec* codec = avcodec_find_decoder(codec_of(parameters->CodecType));
    if (!codec) return kNotSupported;
    made->codec = avcodec_alloc_context3(codec);
    made->codec->thread_count = 1;
    made->codec->flags |= AV_CODEC_FLAG_OUTPUT_CORRUPT;  // pictures that lack references are shown all the same
    if (avcodec_open2(made->codec, codec, nullptr) < 0) return kNotSupported;
    *parser = made.release();
    fake_add("parsers", 1);
    return CUDA_SUCCESS;
}

CUresult cuvidDestroyVideoParser(CUvideoparser parser) {
    delete static_cast<Parser*>(parser);
    fake_add("parsers", -1);
    return CUDA_SUCCESS;
}

CUresult cuvidParseVideoData(CUvideoparser handle, CUVIDSOURCEDATAPACKET* data) {
    if (const CUresult error = fake_call_in_context("cuvidParseVideoData")) return error;
    auto& parser = *static_cast<Parser*>(handle);
    if (data->flags & CUVID_PKT_ENDOFSTREAM) {
        avcodec_send_packet(parser.codec, nullptr);
        return parser.show_ready() ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
    }
    if (!(data->flags & CUVID_PKT_TIMESTAMP)) return kInvalidValue;
    AVPacket* packet = av_packet_alloc();
    av_new_packet(packet, static_cast<int>(data->payload_size));
    std::memcpy(packet->data, data->payload, data->payload_size);
    packet->pts = data->timestamp;
    const bool is_broken = avcodec_send_packet(parser.codec, packet) < 0;
    av_packet_free(&packet);
    if (parser.codec->width == 0) return CUDA_SUCCESS;  // nothing to start from yet
    const bool goes_on = parser.begin_sequence() && parser.decode_next(data->timestamp, is_broken) &&
                         parser.show_ready();
    return goes_on ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
}

CUresult cuvidCreateDecoder(CUvideodecoder* decoder, CUVIDDECODECREATEINFO* info) {
    if (const CUresult error = fake_call_in_context("cuvidCreateDecoder")) return error;
    if (!is_supported(info->CodecType, static_cast<int>(info->bitDepthMinus8))) return kNotSupported;
    const tcu_ulong most = static_cast<tcu_ulong>(setting("max_size", 4096));
    if (!is_unscaled(*info) || info->ulMaxWidth > most || info->ulMaxHeight > most || info->ulWidth > info->ulMaxWidth ||
        info->ulHeight > info->ulMaxHeight) {
        return kInvalidValue;
    }
    auto made = std::make_unique<Decoder>();
    made->info = *info;
    made->surfaces.resize(info->ulNumDecodeSurfaces);
    *decoder = made.release();
    fake_add("decoders", 1);
    fake_set("most_decoders", std::max(fake_get("most_decoders"), fake_get("decoders")));
    return CUDA_SUCCESS;
}

CUresult cuvidReconfigureDecoder(CUvideodecoder handle, CUVIDRECONFIGUREDECODERINFO* info) {
    if (const CUresult error = fake_call_in_context("cuvidReconfigureDecoder")) return error;
    const Use use(handle);
    CUVIDDECODECREATEINFO& now = static_cast<Decoder*>(handle)->info;
    if (!in_sequence_callback || info->ulWidth > now.ulMaxWidth || info->ulHeight > now.ulMaxHeight) return kInvalidValue;
    now.ulWidth = info->ulWidth;
    now.ulHeight = info->ulHeight;
    now.ulTargetWidth = info->ulTargetWidth;
    now.ulTargetHeight = info->ulTargetHeight;
    now.display_area.right = info->display_area.right;
    now.display_area.bottom = info->display_area.bottom;
    return is_unscaled(now) ? CUDA_SUCCESS : kInvalidValue;
}

CUresult cuvidDestroyDecoder(CUvideodecoder decoder) {
    if (const CUresult error = fake_call_in_context("cuvidDestroyDecoder")) return error;
    fake_add("left_mapped", static_cast<Decoder*>(decoder)->mapped);
    delete static_cast<Decoder*>(decoder);
    fake_add("decoders", -1);
    return CUDA_SUCCESS;
}

CUresult cuvidDecodePicture(CUvideodecoder handle, CUVIDPICPARAMS* parameters) {
    if (const CUresult error = fake_call_in_context("cuvidDecodePicture")) return error;
    const Use use(handle);
    auto& decoder = *static_cast<Decoder*>(handle);
    if (parameters->CurrPicIdx >= static_cast<int>(decoder.surfaces.size())) return kInvalidValue;
    const PicturePtr* picture = nullptr;
    std::memcpy(&picture, parameters->CodecSpecific.CodecReserved, sizeof picture);
    decoder.surfaces[parameters->CurrPicIdx] = *picture;
    return CUDA_SUCCESS;
}

CUresult cuvidGetDecodeStatus(CUvideodecoder handle, int surface, CUVIDGETDECODESTATUS* status) {
    if (const CUresult error = fake_call_in_context("cuvidGetDecodeStatus")) return error;
    const Use use(handle);
    Picture& picture = *static_cast<Decoder*>(handle)->surfaces[surface];
    if (picture.codec != cudaVideoCodec_H264 && picture.codec != cudaVideoCodec_HEVC) return kNotSupported;
    const bool is_busy = picture.polls++ < fake_get("busy_polls");
    status->decodeStatus = is_busy             ? cuvidDecodeStatus_InProgress
                           : picture.is_broken ? cuvidDecodeStatus_Error
                                               : cuvidDecodeStatus_Success;
    return CUDA_SUCCESS;
}

CUresult cuvidMapVideoFrame64(CUvideodecoder handle, int surface, unsigned long long* data, unsigned* pitch,
                              CUVIDPROCPARAMS* parameters) {
    if (const CUresult error = fake_call_in_context("cuvidMapVideoFrame")) return error;
    const Use use(handle);
    auto& decoder = *static_cast<Decoder*>(handle);
    const PicturePtr& picture = decoder.surfaces[surface];
    if (!picture || !picture->frame || decoder.mapped >= decoder.info.ulNumOutputSurfaces) return kMapFailed;
    *pitch = decoder.pitch();
    decoder.outputs.emplace_back(*pitch * (decoder.info.ulTargetHeight + 1) / 2 * 3, kOverwritten);
    decoder.fill(*picture->frame, decoder.outputs.back().data());
    *data = reinterpret_cast<unsigned long long>(decoder.outputs.back().data());
    ++decoder.mapped;
    fake_set("stream", reinterpret_cast<long>(parameters->output_stream));
    return CUDA_SUCCESS;
}

CUresult cuvidUnmapVideoFrame64(CUvideodecoder handle, unsigned long long data) {
    if (const CUresult error = fake_call_in_context("cuvidUnmapVideoFrame")) return error;
    const Use use(handle);
    auto& decoder = *static_cast<Decoder*>(handle);
    for (auto& output : decoder.outputs) {
        if (reinterpret_cast<unsigned long long>(output.data()) != data) continue;
        std::fill(output.begin(), output.end(), kOverwritten);
        --decoder.mapped;
        return CUDA_SUCCESS;
    }
    return kInvalidValue;
}

}  // extern "C"
