#include "decoder.h"

#include "unwritten.h"

namespace video {
namespace {

class SoftwareDecoder final : public Decoder {
public:
    SoftwareDecoder(CodecPtr context, FramePtr frame, bool is_marked)
        : context_(std::move(context)), frame_(std::move(frame)), is_marked_(is_marked) {}

    bool decode(const AVPacket* packet, const Take& take, Status* status) override {
        int error = avcodec_send_packet(context_.get(), packet);
        const bool is_whole = error >= 0 || error == AVERROR_EOF;
        while (status->ok()) {
            error = avcodec_receive_frame(context_.get(), frame_.get());
            if (error == AVERROR(EAGAIN) || error == AVERROR_EOF) return is_whole;
            if (error < 0) return false;
            if (is_marked_ && has_unwritten_part(*frame_)) frame_->flags |= AV_FRAME_FLAG_CORRUPT;
            *status = take(*frame_);
        }
        return is_whole;
    }

    void reset() override { avcodec_flush_buffers(context_.get()); }

private:
    CodecPtr context_;
    FramePtr frame_;
    bool is_marked_;
};

// The tag of the container where FFmpeg does not know what it stands for.
std::string name_of(const AVCodecParameters& codec) {
    if (codec.codec_id != AV_CODEC_ID_NONE) return avcodec_get_name(codec.codec_id);
    char tag[AV_FOURCC_MAX_STRING_SIZE] = {};
    av_fourcc_make_string(tag, codec.codec_tag);
    return tag;
}

}  // namespace

Status open_software_decoder(const AVStream* stream, const Limits& limits, std::unique_ptr<Decoder>* decoder) {
    const AVCodec* codec = avcodec_find_decoder(stream->codecpar->codec_id);
    const std::string codec_name = name_of(*stream->codecpar);
    if (!codec) return {Code::kUnsupported, "there is no decoder for its codec, " + codec_name};
    CodecPtr context(avcodec_alloc_context3(codec));
    FramePtr frame(av_frame_alloc());
    if (!context || !frame) return out_of_memory();
    int error = avcodec_parameters_to_context(context.get(), stream->codecpar);
    context->pkt_timebase = stream->time_base;
    context->thread_count = 1;
    context->max_pixels = limits.padded_pixels();  // for a frame that grows in mid-stream
    const bool is_marked = mark_buffers(context.get());
    if (error >= 0) error = avcodec_open2(context.get(), codec, nullptr);
    if (error < 0) return {Code::kDecodeFailed, codec_name + " decoder: " + error_text(error)};
    *decoder = std::make_unique<SoftwareDecoder>(std::move(context), std::move(frame), is_marked);
    return {};
}

}  // namespace video
