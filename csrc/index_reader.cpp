#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder.h"
#include "holes.h"
#include "index.h"

namespace video {
namespace {

void read_orientation(const AVStream* stream, Index* index) {
    const int32_t* matrix = display_matrix(stream);
    if (!matrix) return;
    // x' = m0 x + m3 y, y' = m1 x + m4 y: a quarter turn when the diagonal is zero.
    const bool is_quarter = matrix[0] == 0 && matrix[4] == 0 && matrix[1] != 0 && matrix[3] != 0;
    if (is_quarter) {
        index->orientation = {true, matrix[3] < 0, matrix[1] < 0};
    } else if (matrix[1] == 0 && matrix[3] == 0) {
        index->orientation = {false, matrix[0] < 0, matrix[4] < 0};
    } else {
        const double degrees = av_display_rotation_get(matrix);
        index->unapplied_degrees = std::isfinite(degrees) ? static_cast<int>(std::lround(degrees)) : 0;
    }
}

struct Reading {
    std::vector<PacketTraits> traits;
    bool can_drop = true;
    int error = 0;
    double end_s = 0.0;  // of the last packet of any stream
};

void note_end(const Demuxer& demuxer, const AVPacket* packet, Reading* reading) {
    if (packet->pts == AV_NOPTS_VALUE) return;
    const double ticks = static_cast<double>(packet->pts) + static_cast<double>(packet->duration);
    reading->end_s = std::max(reading->end_s, ticks * av_q2d(demuxer.stream_of(packet)->time_base));
}

bool is_encrypted(const Demuxer& demuxer, const AVPacket* packet) {
    return av_packet_get_side_data(packet, AV_PKT_DATA_ENCRYPTION_INFO, nullptr) ||
           av_dict_get(demuxer.stream()->metadata, "enc_key_id", nullptr, 0);
}

Status encrypted() { return {Code::kUnsupported, "is encrypted"}; }

bool changes_header(const AVPacket* packet, const AVCodecParameters& codec) {
    constexpr uint8_t kTheoraHeader = 0x80;
    if (codec.codec_id == AV_CODEC_ID_THEORA && packet->data[0] & kTheoraHeader) {
        const uint8_t *begin = codec.extradata, *end = begin + codec.extradata_size;
        return std::search(begin, end, packet->data, packet->data + packet->size) == end;
    }
    size_t size = 0;
    const uint8_t* data = av_packet_get_side_data(packet, AV_PKT_DATA_NEW_EXTRADATA, &size);
    return data && (size != static_cast<size_t>(codec.extradata_size) || std::memcmp(data, codec.extradata, size) != 0);
}

// The size of the pictures as the first key decodes: what the header says may be wrong.
Status read_size(const Demuxer& demuxer, const AVPacket* key, const Limits& limits, Index* index) {
    std::unique_ptr<Decoder> decoder;
    if (Status opened = open_software_decoder(demuxer.stream(), limits, &decoder); !opened.ok()) return opened;
    const Decoder::Take take = [index](const AVFrame& frame) -> Status {
        index->width = frame.width;
        index->height = frame.height;
        return {};
    };
    Status ignored;  // what is damaged is found where it is wanted
    decoder->decode(key, take, &ignored);
    decoder->decode(nullptr, take, &ignored);
    return check_pixels(index->width, index->height, limits);
}

Status read_packets(Demuxer& demuxer, const Limits& limits, const Watch& watch, Index* index, Reading* reading) {
    const PacketPtr packet(av_packet_alloc());
    if (!packet) return out_of_memory();
    BitstreamReader bitstream(demuxer.stream()->codecpar);
    // There, its marks are on the packet before one that is damaged, and on whole ones at the joints of a file.
    const bool has_holes_found = demuxer.is_format("mpegts");
    bool has_size = false;
    bool has_new_header = false;  // which only those who read on from the first one have
    while ((reading->error = demuxer.read_any(packet.get())) >= 0) {
        if (packet->size == 0) continue;
        note_end(demuxer, packet.get(), reading);
        if (!demuxer.is_ours(packet.get())) continue;
        if (is_encrypted(demuxer, packet.get())) return encrypted();
        const PacketTraits traits = bitstream.read(packet->data, packet->size);
        // Some files mark keys that are none; where the first one is wrong there is no better.
        const bool is_entry = traits.is_entry || index->packets.empty();
        const auto has_flag = [&](int flag) { return (packet->flags & flag) != 0; };
        has_new_header = has_new_header || changes_header(packet.get(), *demuxer.stream()->codecpar);
        const bool is_key = has_flag(AV_PKT_FLAG_KEY) && is_entry && !traits.is_second_field && !has_new_header;
        const bool is_shown = !has_flag(AV_PKT_FLAG_DISCARD) && !traits.is_hidden && !traits.is_second_field;
        const bool is_cut = has_flag(AV_PKT_FLAG_CORRUPT) && !has_holes_found;
        index->packets.push_back({packet->pts, packet->dts, packet->duration, packet->pos, packet->size, traits.use,
                                  is_key, is_shown, is_cut, traits.is_second_field, traits.is_decodable_leading});
        if (Status checked = check(*index, limits); !checked.ok()) return checked;
        reading->traits.push_back(traits);
        if (!has_size && is_key) {
            has_size = true;
            if (Status read = read_size(demuxer, packet.get(), limits, index); !read.ok()) return read;
        }
    }
    reading->can_drop = bitstream.can_drop();
    return watch.status();
}

FileHoles find_holes(const Demuxer& demuxer, const std::string& path, const Watch& watch) {
    if (demuxer.is_format("matroska")) return find_matroska_holes(path, watch);
    const int packet_bytes = demuxer.transport_packet_bytes();
    if (packet_bytes > 0) return find_transport_holes(path, packet_bytes, demuxer.stream()->id, watch);
    return {};
}

// What follows a hole refers to what is lost in it, up to the next key.
void mark_holes(const FileHoles& found, Index* index) {
    std::vector<IndexedPacket>& packets = index->packets;
    size_t next = 0;
    for (const Hole& hole : found.holes) {
        while (next < packets.size() && packets[next].byte_position < hole.position) ++next;
        if (next < packets.size() && !packets[next].is_key) packets[next].is_cut = true;
        if (!hole.cuts_packet || next == 0) continue;
        size_t cut = next - 1;
        while (cut > 0 && packets[cut - 1].byte_position == packets[cut].byte_position) --cut;
        packets[cut].is_cut = true;
    }
}

// Leaves out what the decoder of the first file would make wrong pictures of.
void cut_off_other_file(const FileHoles& found, Index* index) {
    if (found.other_file_at < 0) return;
    const auto is_other = [&](const IndexedPacket& packet) { return packet.byte_position >= found.other_file_at; };
    std::vector<IndexedPacket>& packets = index->packets;
    packets.erase(std::find_if(packets.begin(), packets.end(), is_other), packets.end());
    index->trouble = "a file with other codec headers is joined to it";
    index->is_truncated = true;
}

// Whether the file holds less than its header promises, or ends where no file does.
void find_early_end(const Demuxer& demuxer, const FileHoles& found, const Reading& reading, Index* index) {
    constexpr double kLargestPause = 0.5;  // seconds that a header may be wrong by
    if (reading.error != AVERROR_EOF) index->trouble = demuxer.describe(reading.error);
    // What is behind the packets may be missing, without harm.
    const double promised_s = demuxer.promised_end_s();
    const bool lacks_packets = found.lacks_bytes && (promised_s <= 0 || promised_s - reading.end_s > kLargestPause);
    index->is_truncated = !index->trouble.empty() || found.ends_in_packet || lacks_packets ||
                          static_cast<int>(index->packets.size()) < demuxer.num_promised_packets();
}

// An AVI lists its chunks: one that no packet holds is lost, and the packets do not tell.
void find_lost_chunks(const Demuxer& demuxer, Index* index) {
    constexpr int64_t kChunkHeader = 8;
    if (!demuxer.is_format("avi")) return;
    std::vector<int32_t> by_position(index->packets.size());
    std::iota(by_position.begin(), by_position.end(), 0);
    const auto position = [index](int32_t packet) { return index->packets[packet].byte_position; };
    std::stable_sort(by_position.begin(), by_position.end(),
                     [&](int32_t a, int32_t b) { return position(a) < position(b); });
    bool is_list_of_packets = false;
    int64_t spare = 0;  // bytes of the last packet found that go beyond its chunk: a parser may join chunks
    for (int i = 0; i < avformat_index_get_entries_count(demuxer.stream()); ++i) {
        const AVIndexEntry& chunk = *demuxer.listed_chunk(i);
        if (chunk.size == 0) continue;  // a frame that was dropped on purpose
        const int64_t begin = chunk.pos + kChunkHeader;
        const auto next = std::lower_bound(by_position.begin(), by_position.end(), begin,
                                           [&](int32_t packet, int64_t value) { return position(packet) < value; });
        const bool is_at_end = next == by_position.end();
        if (!is_at_end && position(*next) == begin) {
            is_list_of_packets = true;
            spare = index->packets[*next].size - chunk.size;
        } else if (spare >= chunk.size) {
            spare -= chunk.size;
        } else if (is_list_of_packets) {
            (is_at_end ? index->is_truncated : index->packets[*next].is_cut) = true;
        }
    }
}

// Whether most pictures that are shown before one that was decoded earlier claim to be shown after it.
bool has_false_times(const Reading& reading, const Index& index) {
    int num_true = 0;
    int num_false = 0;
    size_t reference = 0;  // the last one
    for (size_t i = 1; i < reading.traits.size(); ++i) {
        const PacketTraits& traits = reading.traits[i];
        if (traits.is_second_field) continue;
        const bool is_back = traits.is_bidirectional || is_shown_before(traits.order, reading.traits[reference].order);
        const bool has_pts = index.packets[i].pts != IndexedPacket::kNone;
        if (is_back && has_pts) ++(index.packets[i].pts > index.packets[reference].pts ? num_false : num_true);
        if (!traits.is_bidirectional) reference = i;
    }
    return num_false > num_true;
}

// Where frames are known by counting, one that is gone moves all that follow.
void find_lost_pictures(const Reading& reading, Index* index) {
    std::vector<PictureOrder> pictures;
    for (const PacketTraits& traits : reading.traits) pictures.push_back(traits.order);
    for (const size_t packet : find_losses(pictures)) index->packets[packet].is_cut = true;
}

// A picture that others of its layer do not refer to may still serve higher layers: only the highest can go.
void keep_lower_layers(const Reading& reading, Index* index) {
    uint8_t highest = 0;
    for (const PacketTraits& traits : reading.traits) highest = std::max(highest, traits.temporal_id);
    for (size_t i = 0; i < reading.traits.size(); ++i) {
        if (!reading.can_drop || reading.traits[i].temporal_id < highest) index->packets[i].use = {1, 1};
    }
}

// Fields in packets of their own: a frame lasts as long as both, and is not whole with one. The last field of a stream
// may be alone.
void join_fields(const Reading& reading, Index* index) {
    for (size_t i = 0; i < reading.traits.size(); ++i) {
        const bool has_second = i + 1 < reading.traits.size() && reading.traits[i + 1].is_second_field;
        if (has_second) index->packets[i].duration += index->packets[i + 1].duration;
        if (has_second) index->frame_rate = {0, 1};  // may count fields
        const bool is_last = i + 1 == reading.traits.size();
        if (reading.traits[i].lacks_field && !has_second && !is_last) index->packets[i].is_cut = true;
    }
}

void describe(const Demuxer& demuxer, Index* index) {
    const AVStream* stream = demuxer.stream();
    index->format = demuxer.format_name();
    index->codec = avcodec_get_name(stream->codecpar->codec_id);
    index->width = stream->codecpar->width;
    index->height = stream->codecpar->height;
    index->clock_bits = stream->pts_wrap_bits;
    read_orientation(stream, index);
    index->time_base = stream->time_base;
    index->frame_rate = stream->avg_frame_rate.den > 0 ? stream->avg_frame_rate : AVRational{0, 1};
}

}  // namespace

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

Status check(const Index& index, const Limits& limits) {
    if (Status checked = check_pixels(index.width, index.height, limits); !checked.ok()) return checked;
    if (static_cast<int64_t>(index.packets.size()) > limits.max_num_frames) {
        return {Code::kLimitExceeded,
                "has more than max_num_frames = " + std::to_string(limits.max_num_frames) + " frames"};
    }
    return {};
}

IndexResult read_index(const std::string& path, const Limits& limits, const Watch& watch) {
    const auto started = Watch::Clock::now();
    Demuxer demuxer(limits, watch);
    if (Status opened = demuxer.open(path, true); !opened.ok()) return {std::move(opened), nullptr};
    auto index = std::make_shared<Index>();
    index->path = path;
    struct stat file = {};
    if (stat(path.c_str(), &file) == 0) {
        index->file_size = file.st_size;
        index->modified_ns = nanoseconds(file.st_mtim);
    }
    describe(demuxer, index.get());
    if (Status checked = check(*index, limits); !checked.ok()) return {std::move(checked), nullptr};
    Reading reading;
    if (Status read = read_packets(demuxer, limits, watch, index.get(), &reading); !read.ok()) {
        return {std::move(read), nullptr};
    }
    if (!index->packets.empty() && (index->width < 1 || index->height < 1)) {
        return {{Code::kDecodeFailed, "no picture decodes, and no header tells their size"}, nullptr};
    }
    const FileHoles found = find_holes(demuxer, path, watch);
    if (watch.expired()) return {watch.status(), nullptr};
    if (found.is_encrypted) return {encrypted(), nullptr};
    mark_holes(found, index.get());
    find_early_end(demuxer, found, reading, index.get());
    cut_off_other_file(found, index.get());
    reading.traits.resize(index->packets.size());
    keep_lower_layers(reading, index.get());
    join_fields(reading, index.get());
    find_lost_chunks(demuxer, index.get());
    index->has_false_times = has_false_times(reading, *index);
    index->decoder_delay = std::max(demuxer.stream()->codecpar->video_delay, index->has_false_times ? 1 : 0);
    index->arrange();
    if (!index->has_times) find_lost_pictures(reading, index.get());
    index->read_s = std::chrono::duration<double>(Watch::Clock::now() - started).count();
    return {{}, std::move(index)};
}

}  // namespace video
