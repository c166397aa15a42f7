// Packets of the one video stream of a file that is worth decoding.
#pragma once

#include <limits>
#include <optional>
#include <string>

#include "ffmpeg.h"
#include "header_joiner.h"
#include "mpeg4_unpacker.h"
#include "watch.h"

namespace video {

// Not ok for frames that may not be decoded.
Status check_pixels(int width, int height, const Limits& limits);

class Demuxer {
public:
    // `watch` must outlive the demuxer.
    Demuxer(const Limits& limits, const Watch& watch) : limits_(limits), watch_(watch) {}

    // Packets of other streams are skipped unless `keep_others` and the header tells when the last of them ends.
    Status open(const std::string& path, bool keep_others = false);
    // Next packet of the stream, never an empty one: 0, AVERROR_EOF or another FFmpeg error.
    int read(AVPacket* packet);
    // Next packet of any stream.
    int read_any(AVPacket* packet);
    // What such an error means.
    std::string describe(int error) const;
    bool is_ours(const AVPacket* packet) const { return packet->stream_index == stream_->index; }
    // To a key frame at or before `timestamp`, in stream time or, if `by_byte`, at this place in the file.
    // Where it lands is not to be trusted: compare the packets that follow with the index.
    bool seek(int64_t timestamp, bool by_byte);

    const AVStream* stream() const { return stream_; }
    const AVStream* stream_of(const AVPacket* packet) const { return format_->streams[packet->stream_index]; }
    // Seconds from 0 to the end of the last packet, as the header of the file says; 0 where it does not.
    double promised_end_s() const;
    // Packets that the container lists before it holds them, without empty ones and joined ones; 0 where it does not.
    int num_promised_packets() const;
    // A chunk of the stream by the container's own list of them, below avformat_index_get_entries_count(stream()).
    const AVIndexEntry* listed_chunk(int number) const { return avformat_index_get_entry(stream_, number); }
    // Bytes of the packets that an MPEG transport stream is made of; 0 for other formats.
    int transport_packet_bytes() const;
    const char* format_name() const { return format_->iformat->name; }
    bool is_format(const char* name) const;

private:
    int read_packet(AVPacket* packet);
    Status open_format(const std::string& path, FormatPtr* format);
    Status check_size(const std::string& path);
    Status probe();
    // Ends a read of `format` that goes on for longer than a picture can be.
    void bound_read(const AVFormatContext* format);
    int64_t largest_picture() const;
    bool should_stop();

    const Limits limits_;
    const Watch& watch_;
    FormatPtr format_;
    AVStream* stream_ = nullptr;
    std::optional<Mpeg4Unpacker> unpacker_;
    std::optional<HeaderJoiner> joiner_;
    const AVFormatContext* reading_ = nullptr;
    int64_t stop_at_ = std::numeric_limits<int64_t>::max();  // byte of the file
    bool was_stopped_ = false;
};

}  // namespace video
