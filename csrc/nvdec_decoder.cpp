#include "nvdec_decoder.h"

#include <chrono>
#include <new>
#include <thread>

#include "nvdec.h"

namespace video {
namespace {

// Pictures that the parser holds back, so that a decoder is busy while an earlier picture is copied.
constexpr int kDisplayDelay = 4;
constexpr auto kPollEvery = std::chrono::microseconds(50);

Status unsupported(std::string reason) { return {Code::kUnsupported, std::move(reason)}; }

const char* filter_name(AVCodecID codec) {
    return codec == AV_CODEC_ID_H264 ? "h264_mp4toannexb" : codec == AV_CODEC_ID_HEVC ? "hevc_mp4toannexb" : "null";
}

// The parameter sets in a stream's extradata, as they would stand in the stream itself.
std::vector<uint8_t> header_of(const AVCodecParameters* codec) {
    const uint8_t* data = codec->extradata;
    const int size = codec->extradata_size;
    if (!data || codec->codec_id == AV_CODEC_ID_VP8 || codec->codec_id == AV_CODEC_ID_VP9) return {};
    constexpr int kAv1Record = 4;  // bytes of an AV1 configuration record before the units that it holds
    const bool is_av1_record = codec->codec_id == AV_CODEC_ID_AV1 && size >= kAv1Record && (data[0] & 0x80);
    return {data + (is_av1_record ? kAv1Record : 0), data + size};
}

}  // namespace

Status NvdecDecoder::open(const AVStream* stream, const Index& index, const Watch& watch, const NvdecDriver& driver,
                          NvdecEngine* engine, std::unique_ptr<Decoder>* decoder) {
    std::unique_ptr<NvdecDecoder> opened(new NvdecDecoder(index, watch, driver, engine));
    opened->codec_ = nvdec_codec(stream->codecpar->codec_id);
    opened->filtered_.reset(av_packet_alloc());
    opened->frame_.reset(av_frame_alloc());
    if (!opened->filtered_ || !opened->frame_) return out_of_memory();
    if (Status status = opened->open_filter(stream->codecpar); !status.ok()) return status;
    *decoder = std::move(opened);
    return {};
}

NvdecDecoder::~NvdecDecoder() { reset(); }

Status NvdecDecoder::open_filter(const AVCodecParameters* codec) {
    const AVBitStreamFilter* kind = av_bsf_get_by_name(filter_name(codec->codec_id));
    if (!kind) return unsupported(std::string("FFmpeg has no filter ") + filter_name(codec->codec_id));
    AVBSFContext* filter = nullptr;
    int error = av_bsf_alloc(kind, &filter);
    filter_.reset(filter);
    if (error >= 0) error = avcodec_parameters_copy(filter->par_in, codec);
    if (error >= 0) error = av_bsf_init(filter);
    if (error < 0) return unsupported(std::string(kind->name) + ": " + error_text(error));
    header_ = header_of(filter->par_out);
    return {};
}

bool NvdecDecoder::decode(const AVPacket* packet, const Take& take, Status* status) {
    take_ = &take;
    status_ = {};
    if (packet) {
        *status = parse(packet);
    } else if (parser_) {
        CUVIDSOURCEDATAPACKET end = {};
        end.flags = CUVID_PKT_ENDOFSTREAM;
        *status = feed(&end);
        while (status->ok() && !in_flight_.empty()) *status = settle(in_flight_.begin()->first);
        if (status->ok()) *status = engine_.finish_copies();
    }
    return true;
}

void NvdecDecoder::reset() {
    if (parser_) driver_.cuvidDestroyVideoParser(parser_);
    parser_ = nullptr;
    has_format_ = false;
    first_packet_ = packet_ = -1;
    in_flight_.clear();
    if (filter_) av_bsf_flush(filter_.get());
}

Status NvdecDecoder::parse(const AVPacket* packet) {
    packet_ = static_cast<int32_t>(packet->pts);
    if (packet_ < 0) return unsupported("a packet that the index does not know");
    if (!parser_) {
        if (Status opened = open_parser(); !opened.ok()) return opened;
        first_packet_ = packet_;
    }
    // No other HEVC picture refers to these, and some parsers count on them to be shown, which not all of them are.
    if (codec_ == cudaVideoCodec_HEVC && is_leading(packet_)) return {};
    int error = av_packet_ref(filtered_.get(), packet);
    if (error >= 0) error = av_bsf_send_packet(filter_.get(), filtered_.get());
    while (error >= 0) {
        error = av_bsf_receive_packet(filter_.get(), filtered_.get());
        if (error == AVERROR(EAGAIN)) return {};
        if (error < 0) break;
        CUVIDSOURCEDATAPACKET data = {};
        // The parser sorts time stamps that do not rise in the order of presentation: it gets the true ones.
        data.flags = CUVID_PKT_TIMESTAMP | CUVID_PKT_ENDOFPICTURE;
        data.timestamp = index_.packets[packet_].pts;
        data.payload = filtered_->data;
        data.payload_size = filtered_->size;
        if (!has_format_ && !header_.empty()) {
            joined_ = header_;
            joined_.insert(joined_.end(), filtered_->data, filtered_->data + filtered_->size);
            data.payload = joined_.data();
            data.payload_size = joined_.size();
        }
        Status fed = feed(&data);
        av_packet_unref(filtered_.get());
        if (!fed.ok()) return fed;
    }
    return unsupported(std::string(filter_->filter->name) + ": " + error_text(error));
}

bool NvdecDecoder::is_leading(int32_t packet) const {
    return index_.packets[packet].pts < index_.packets[first_packet_].pts;
}

Status NvdecDecoder::open_parser() {
    CUVIDPARSERPARAMS parameters = {};
    parameters.CodecType = codec_;
    parameters.ulMaxNumDecodeSurfaces = 1;  // what the sequence callback returns takes its place
    parameters.ulMaxDisplayDelay = kDisplayDelay;
    parameters.pUserData = this;
    parameters.pfnSequenceCallback = [](void* self, CUVIDEOFORMAT* format) -> int {
        return static_cast<NvdecDecoder*>(self)->on_sequence(*format);
    };
    parameters.pfnDecodePicture = [](void* self, CUVIDPICPARAMS* picture) -> int {
        return static_cast<NvdecDecoder*>(self)->on_decode(picture);
    };
    parameters.pfnDisplayPicture = [](void* self, CUVIDPARSERDISPINFO* shown) -> int {
        return shown ? static_cast<NvdecDecoder*>(self)->on_display(*shown) : 1;
    };
    return driver_.check(driver_.cuvidCreateVideoParser(&parser_, &parameters), "cuvidCreateVideoParser");
}

Status NvdecDecoder::feed(CUVIDSOURCEDATAPACKET* packet) {
    Status parsed = driver_.check(driver_.cuvidParseVideoData(parser_, packet), "cuvidParseVideoData");
    return status_.ok() ? parsed : status_;
}

int NvdecDecoder::on_sequence(const CUVIDEOFORMAT& format) {
    if (status_.ok()) status_ = prepare(format);
    return status_.ok() ? engine_.num_surfaces() : 0;
}

Status NvdecDecoder::prepare(const CUVIDEOFORMAT& format) {
    const auto& area = format.display_area;
    const bool is_size = area.right - area.left == index_.width && area.bottom - area.top == index_.height;
    if (!is_size) return unsupported("the size of its pictures changes");
    if (format.chroma_format != cudaVideoChromaFormat_420) return unsupported("its pictures are not 4:2:0");
    if (format.coded_width % 2 || format.coded_height % 2 || area.left % 2 || area.top % 2) {
        return unsupported("its coded size or its crop is odd");
    }
    if (has_format_ && !engine_.is_ready_for(format)) return unsupported("its pictures change in kind");
    format_ = format;
    has_format_ = true;
    return engine_.prepare(format);
}

int NvdecDecoder::on_decode(CUVIDPICPARAMS* picture) {
    if (status_.ok() && !has_format_) status_ = unsupported("pictures before their sequence");
    if (status_.ok() && !picture->second_field) status_ = settle(picture->CurrPicIdx);
    if (status_.ok()) status_ = engine_.decode(picture);
    if (!status_.ok()) return 0;
    if (picture->second_field) return 1;
    try {
        in_flight_[picture->CurrPicIdx] = packet_;
    } catch (const std::bad_alloc&) {
        status_ = out_of_memory();
    }
    return status_.ok();
}

int NvdecDecoder::on_display(const CUVIDPARSERDISPINFO& shown) {
    if (!status_.ok()) return 0;
    const int32_t packet = index_.find(shown.timestamp);
    // What is shown before the start may lack what it refers to, and the driver does not say so.
    if (packet < 0 || is_leading(packet)) return 1;
    const bool shows_again = codec_ == cudaVideoCodec_VP9 || codec_ == cudaVideoCodec_AV1;
    const auto decoded = in_flight_.find(shown.picture_index);
    if (!shows_again && (decoded == in_flight_.end() || decoded->second != packet)) {
        status_ = unsupported("the driver takes another picture for packet " + std::to_string(packet));
        return 0;
    }
    NvdecPicture picture;
    picture.index = shown.picture_index;
    picture.processing.progressive_frame = shown.progressive_frame;
    picture.processing.top_field_first = shown.top_field_first;
    picture.processing.unpaired_field = shown.repeat_first_field < 0;
    picture.left = format_.display_area.left;
    picture.top = format_.display_area.top;
    picture.width = index_.width;
    picture.height = index_.height;
    frame_->pts = packet;
    frame_->width = picture.width;
    frame_->height = picture.height;
    frame_->opaque = &picture;
    try {
        status_ = (*take_)(*frame_);
    } catch (const std::bad_alloc&) {
        status_ = out_of_memory();
    }
    frame_->opaque = nullptr;
    return status_.ok();
}

Status NvdecDecoder::settle(int surface) {
    const auto last = in_flight_.find(surface);
    if (last == in_flight_.end()) return {};
    const int32_t packet = last->second;
    in_flight_.erase(last);
    cuvidDecodeStatus state = engine_.status(surface);
    while (state == cuvidDecodeStatus_InProgress) {
        if (watch_.expired()) return watch_.status();
        std::this_thread::sleep_for(kPollEvery);
        state = engine_.status(surface);
    }
    // Pictures shown before the one that decoding started from may lack what they refer to; nobody wants them.
    const bool is_broken = state == cuvidDecodeStatus_Error || state == cuvidDecodeStatus_Error_Concealed;
    if (is_broken && !is_leading(packet)) return unsupported("errors in packet " + std::to_string(packet));
    return {};
}

}  // namespace video
