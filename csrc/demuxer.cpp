#include "demuxer.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <vector>

namespace video {
namespace {

// Formats that hold their own data; playlists and image sequences would open other files.
constexpr const char* kFormats =
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h263,h264,hevc,vvc,vc1,mjpeg,ivf,obu,av1,flv,ogg,asf,mxf,nut,gif,"
    "apng,webp_anim,rm,wtv,dv,yuv4mpegpipe";

// Of these, only the next picture's beginning tells where one ends.
constexpr const char* kUnframedFormats = "mpegvideo,m4v,h263,h264,hevc,vvc,vc1,mjpeg,obu,av1";

constexpr int64_t kLargestPicture = int64_t{1} << 25;  // bytes of one, at least

// Whether two lists of names have one in common.
bool is_one_of(const char* name, const char* list) { return av_match_list(name, list, ',') > 0; }

// Everything a decoder needs to start; without it the stream has to be probed, which takes a lock of the whole process.
bool is_complete(const AVFormatContext* format, const AVStream* stream) {
    const std::string name = format->iformat->name;
    if (name.rfind("mov", 0) != 0 && name.rfind("matroska", 0) != 0) return false;
    const AVCodecParameters* codec = stream->codecpar;
    const bool in_header = codec->codec_id == AV_CODEC_ID_VP8 || codec->codec_id == AV_CODEC_ID_VP9 ||
                           codec->codec_id == AV_CODEC_ID_AV1 || codec->extradata_size > 0;
    return codec->codec_id != AV_CODEC_ID_NONE && codec->width > 0 && codec->height > 0 && in_header;
}

// As the ffmpeg command line picks: the default one first, then the largest; never a cover picture.
AVStream* best_stream(const AVFormatContext* format) {
    AVStream* best = nullptr;
    int64_t best_score = -1;
    for (unsigned i = 0; i < format->nb_streams; ++i) {
        AVStream* stream = format->streams[i];
        const AVCodecParameters* codec = stream->codecpar;
        if (codec->codec_type != AVMEDIA_TYPE_VIDEO || (stream->disposition & AV_DISPOSITION_ATTACHED_PIC)) continue;
        const int64_t is_default = (stream->disposition & AV_DISPOSITION_DEFAULT) ? 1 : 0;
        const int64_t score = int64_t{codec->width} * codec->height + 5'000'000 * is_default;
        if (score > best_score) {
            best = stream;
            best_score = score;
        }
    }
    return best;
}

// What FFmpeg takes a file for, "" for nothing.
std::string format_of(const std::string& path) {
    std::vector<uint8_t> head(4096 + AVPROBE_PADDING_SIZE, 0);
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(head.data()), static_cast<std::streamsize>(head.size() - AVPROBE_PADDING_SIZE));
    AVProbeData data = {path.c_str(), head.data(), static_cast<int>(file.gcount()), nullptr};
    const AVInputFormat* format = av_probe_input_format(&data, 1);
    return format ? format->name : "";
}

}  // namespace

Status check_pixels(int width, int height, const Limits& limits) {
    if (int64_t{width} * height <= limits.max_frame_pixels) return {};
    return {Code::kLimitExceeded, std::to_string(width) + " x " + std::to_string(height) +
                                      " is over max_frame_pixels = " + std::to_string(limits.max_frame_pixels)};
}

Status Demuxer::open(const std::string& path, bool keep_others) {
    struct stat file = {};
    const bool is_name = path.find('\0') == std::string::npos;
    if (!is_name || stat(path.c_str(), &file) != 0) return {Code::kNotFound, "no such file"};
    // Opening a FIFO would block where no interrupt callback is asked.
    if (!S_ISREG(file.st_mode)) return {Code::kOpenFailed, "not a regular file"};
    if (file.st_size == 0) return {Code::kOpenFailed, "the file is empty"};

    if (Status opened = open_format(path, &format_); !opened.ok()) return opened;
    stream_ = best_stream(format_.get());
    if (!stream_ || !is_complete(format_.get(), stream_)) {
        if (Status checked = check_size(path); !checked.ok()) return checked;
        if (Status probed = probe(); !probed.ok()) return probed;
        stream_ = best_stream(format_.get());
    }
    if (!stream_) return {Code::kNoVideoStream, "has no video stream"};
    // Else where another stream is cut off, reading would end.
    const bool keeps = keep_others && promised_end_s() > 0;
    for (unsigned i = 0; !keeps && i < format_->nb_streams; ++i) {
        if (format_->streams[i] != stream_) format_->streams[i]->discard = AVDISCARD_ALL;
    }
    const AVCodecID codec = stream_->codecpar->codec_id;
    if (codec == AV_CODEC_ID_MPEG4) unpacker_.emplace(stream_->codecpar);
    if (codec == AV_CODEC_ID_H264 || codec == AV_CODEC_ID_HEVC) joiner_.emplace(*stream_->codecpar);
    return {};
}

Status Demuxer::open_format(const std::string& path, FormatPtr* format) {
    AVFormatContext* context = avformat_alloc_context();
    if (!context) return out_of_memory();
    context->interrupt_callback = {[](void* demuxer) -> int { return static_cast<Demuxer*>(demuxer)->should_stop(); },
                                   this};
    AVDictionary* options = nullptr;
    av_dict_set(&options, "protocol_whitelist", "file", 0);
    av_dict_set(&options, "format_whitelist", kFormats, 0);
    const int error = avformat_open_input(&context, ("file:" + path).c_str(), nullptr, &options);
    av_dict_free(&options);
    if (error < 0) {
        if (watch_.expired()) return watch_.status();
        const std::string kind = format_of(path);
        const bool is_refused = error == AVERROR(EINVAL) && !kind.empty();
        const std::string reason = is_refused ? "files of the format " + kind + " are not read" : error_text(error);
        return {Code::kOpenFailed, "cannot be opened as a video (" + reason + ")"};
    }
    format->reset(context);
    return {};
}

// Probing decodes, and no deadline ends the decoding of a frame: first learn the size from what parsers tell.
Status Demuxer::check_size(const std::string& path) {
    FormatPtr format;
    if (Status opened = open_format(path, &format); !opened.ok()) return opened;
    av_opt_set(format.get(), "codec_whitelist", "none", 0);
    bound_read(format.get());
    avformat_find_stream_info(format.get(), nullptr);
    reading_ = nullptr;
    if (watch_.expired()) return watch_.status();
    if (was_stopped_) return {Code::kOpenFailed, describe(AVERROR_EXIT)};
    const AVStream* stream = best_stream(format.get());
    return stream ? check_pixels(stream->codecpar->width, stream->codecpar->height, limits_) : Status();
}

Status Demuxer::probe() {
    // Other streams are decoded too, and this one may grow.
    std::vector<AVDictionary*> options(format_->nb_streams, nullptr);
    for (AVDictionary*& option : options) av_dict_set_int(&option, "max_pixels", limits_.padded_pixels(), 0);
    bound_read(format_.get());
    const int error = avformat_find_stream_info(format_.get(), options.data());
    for (AVDictionary*& option : options) av_dict_free(&option);
    if (watch_.expired()) return watch_.status();
    if (error < 0) return {Code::kOpenFailed, "cannot be probed (" + error_text(error) + ")"};
    return {};
}

int Demuxer::read(AVPacket* packet) {
    int error = 0;
    do {
        error = read_any(packet);
    } while (error >= 0 && (!is_ours(packet) || packet->size == 0));
    return error;
}

int Demuxer::read_any(AVPacket* packet) {
    int error = read_packet(packet);
    if (error < 0 || !is_ours(packet)) return error;
    if (unpacker_) return unpacker_->unpack(packet);
    if (!joiner_) return error;
    while (joiner_->hold(*packet)) {
        do {
            error = read_packet(packet);
        } while (error >= 0 && !is_ours(packet));
        if (error < 0) return error;
    }
    return joiner_->join(packet);
}

int Demuxer::read_packet(AVPacket* packet) {
    int error = AVERROR(EAGAIN);
    while (error == AVERROR(EAGAIN)) {
        av_packet_unref(packet);
        bound_read(format_.get());
        error = should_stop() ? AVERROR_EXIT : av_read_frame(format_.get(), packet);
    }
    if (was_stopped_) return AVERROR_EXIT;  // what a parser had gathered is no picture
    return error;
}

void Demuxer::bound_read(const AVFormatContext* format) {
    if (!format->pb || !is_one_of(format->iformat->name, kUnframedFormats)) return;
    reading_ = format;
    stop_at_ = avio_tell(format->pb) + largest_picture();
}

int64_t Demuxer::largest_picture() const { return std::max(kLargestPicture, limits_.max_frame_pixels); }

bool Demuxer::should_stop() {
    was_stopped_ = was_stopped_ || (reading_ && reading_->pb && avio_tell(reading_->pb) > stop_at_);
    return was_stopped_ || watch_.expired();
}

std::string Demuxer::describe(int error) const {
    if (!was_stopped_) return error_text(error);
    return "holds no picture in " + std::to_string(largest_picture()) + " bytes";
}

double Demuxer::promised_end_s() const {
    const bool is_in_header = is_format("matroska") && format_->duration > 0;
    return is_in_header ? static_cast<double>(format_->duration) / AV_TIME_BASE : 0.0;
}

int Demuxer::num_promised_packets() const {
    int count = 0;
    const int listed = is_format("mov") ? avformat_index_get_entries_count(stream_) : 0;
    for (int i = 0; i < listed; ++i) count += avformat_index_get_entry(stream_, i)->size > 0;
    return joiner_ ? count - joiner_->num_held() : count;
}

int Demuxer::transport_packet_bytes() const {
    int64_t bytes = 0;
    if (is_format("mpegts")) av_opt_get_int(format_.get(), "ts_packetsize", AV_OPT_SEARCH_CHILDREN, &bytes);
    return static_cast<int>(bytes);
}

bool Demuxer::seek(int64_t timestamp, bool by_byte) {
    if (unpacker_) unpacker_->reset();
    if (joiner_) joiner_->reset();
    const int flags = AVSEEK_FLAG_BACKWARD | (by_byte ? AVSEEK_FLAG_BYTE : 0);
    return av_seek_frame(format_.get(), stream_->index, timestamp, flags) >= 0;
}

bool Demuxer::is_format(const char* name) const {
    return is_one_of(format_->iformat->name, name);
}

}  // namespace video
