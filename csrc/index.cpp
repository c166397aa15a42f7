#include "index.h"

#include <sys/stat.h>

#include <algorithm>
#include <numeric>

namespace video {
namespace {

// Bytes of headers that may lie between two packets of a Matroska file, and seconds that its header may be wrong by.
constexpr int64_t kLargestGap = 1024;
constexpr double kLargestPause = 0.5;

Orientation orientation_of(const AVStream* stream) {
    const int32_t* matrix = display_matrix(stream);
    if (!matrix) return {};
    // x' = m0 x + m3 y, y' = m1 x + m4 y: a quarter turn when the diagonal is zero. Other angles are not applied.
    const bool is_quarter = matrix[0] == 0 && matrix[4] == 0 && matrix[1] != 0 && matrix[3] != 0;
    if (is_quarter) return {true, matrix[3] < 0, matrix[1] < 0};
    if (matrix[1] == 0 && matrix[3] == 0) return {false, matrix[0] < 0, matrix[4] < 0};
    return {};
}

struct Reading {
    std::vector<PacketTraits> traits;
    bool can_drop = true;
    int error = 0;
    double end_s = 0.0;       // of the last packet of any stream
    int64_t end_byte = 0;     // likewise
    int64_t largest = 0;      // bytes of a packet
};

// Matroska carries its packets one after the other: a hole between two means that the demuxer lost its way.
void follow(const Demuxer& demuxer, const AVPacket* packet, Reading* reading, Index* index) {
    if (packet->pos >= 0) {
        const bool is_hole = reading->end_byte > 0 && packet->pos - reading->end_byte > kLargestGap;
        if (is_hole && demuxer.is_format("matroska") && !index->packets.empty()) index->packets.back().is_cut = true;
        reading->end_byte = std::max(reading->end_byte, packet->pos + packet->size);
    }
    reading->largest = std::max<int64_t>(reading->largest, packet->size);
    if (packet->pts != AV_NOPTS_VALUE) {
        const double ticks = static_cast<double>(packet->pts) + static_cast<double>(packet->duration);
        reading->end_s = std::max(reading->end_s, ticks * av_q2d(demuxer.stream_of(packet)->time_base));
    }
}

Status read_packets(Demuxer& demuxer, const Limits& limits, const Watch& watch, Index* index, Reading* reading) {
    const PacketPtr packet(av_packet_alloc());
    if (!packet) return out_of_memory();
    BitstreamReader bitstream(demuxer.stream()->codecpar);
    // Where a parser cuts packets out of a stream, the mark of a damaged piece comes on the packet before it.
    const bool marks_early = demuxer.is_format("mpegts");
    bool is_next_cut = false;
    while ((reading->error = demuxer.read_any(packet.get())) >= 0) {
        if (packet->size == 0) continue;
        follow(demuxer, packet.get(), reading, index);
        if (!demuxer.is_ours(packet.get())) continue;
        const PacketTraits traits = bitstream.read(packet->data, packet->size);
        // Some files mark keys that are none; where the first one is wrong there is no better.
        const bool is_entry = traits.is_entry || index->packets.empty();
        const auto has_flag = [&](int flag) { return (packet->flags & flag) != 0; };
        const bool is_key = has_flag(AV_PKT_FLAG_KEY) && is_entry && !traits.is_second_field;
        const bool is_shown = !has_flag(AV_PKT_FLAG_DISCARD) && !traits.hidden && !traits.is_second_field;
        const bool is_cut = marks_early ? is_next_cut : has_flag(AV_PKT_FLAG_CORRUPT);
        index->packets.push_back({packet->pts, packet->dts, packet->duration, packet->pos, packet->size, traits.use,
                                  is_key, is_shown, is_cut, traits.is_second_field});
        is_next_cut = has_flag(AV_PKT_FLAG_CORRUPT);
        if (Status checked = check(*index, limits); !checked.ok()) return checked;
        reading->traits.push_back(traits);
    }
    reading->can_drop = bitstream.can_drop();
    return watch.status();
}

// Whether the last transport packet is not whole.
bool ends_inside_packet(const Demuxer& demuxer, const Index& index) {
    const int64_t bytes = demuxer.transport_packet_bytes();
    if (bytes <= 0 || index.packets.empty() || index.packets[0].byte_position < 0) return false;
    return (index.file_size - index.packets[0].byte_position) % bytes != 0;
}

// Whether the file holds less than its header promises, or ends where no file does.
void find_early_end(const Demuxer& demuxer, const Reading& reading, Index* index) {
    // Only these containers list their packets before they hold them.
    const int promised = demuxer.is_format("mov") ? avformat_index_get_entries_count(demuxer.stream()) : 0;
    const bool ends_early = demuxer.promised_end_s() - reading.end_s > kLargestPause;
    if (reading.error != AVERROR_EOF) index->trouble = error_text(reading.error);
    index->is_truncated =
        ends_early || !index->trouble.empty() || static_cast<int>(index->packets.size()) < promised ||
        ends_inside_packet(demuxer, *index);
    // More than one packet follows unread: the last one read is where the demuxer lost its way.
    const int64_t unread = index->file_size - reading.end_byte;
    if (ends_early && unread > reading.largest + kLargestGap && !index->packets.empty()) {
        index->packets.back().is_cut = true;
    }
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

// Fields in packets of their own: a frame lasts as long as both, and is not whole with one.
void join_fields(const Reading& reading, Index* index) {
    for (size_t i = 0; i < reading.traits.size(); ++i) {
        const bool has_second = i + 1 < reading.traits.size() && reading.traits[i + 1].is_second_field;
        if (has_second) index->packets[i].duration += index->packets[i + 1].duration;
        if (has_second) index->frame_rate = {0, 1};  // may count fields
        if (reading.traits[i].lacks_field && !has_second) index->packets[i].is_cut = true;
    }
}

void describe(const Demuxer& demuxer, Index* index) {
    const AVStream* stream = demuxer.stream();
    index->format = demuxer.format_name();
    index->codec = avcodec_get_name(stream->codecpar->codec_id);
    index->width = stream->codecpar->width;
    index->height = stream->codecpar->height;
    index->orientation = orientation_of(stream);
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

void Index::arrange() {
    by_pts_.clear();
    for (size_t i = 0; i < packets.size(); ++i) {
        const bool is_nameless = packets[i].is_second_field && packets[i].pts == IndexedPacket::kNone;
        if (!is_nameless) by_pts_.push_back(static_cast<int32_t>(i));
    }
    std::stable_sort(by_pts_.begin(), by_pts_.end(),
                     [this](int32_t a, int32_t b) { return packets[a].pts < packets[b].pts; });
    has_times = true;
    for (size_t i = 0; i < by_pts_.size(); ++i) {
        const int64_t pts = packets[by_pts_[i]].pts;
        if (pts == IndexedPacket::kNone || (i > 0 && pts == packets[by_pts_[i - 1]].pts)) has_times = false;
    }
    keys.clear();
    cuts_.clear();
    for (size_t i = 0; i < packets.size(); ++i) {
        if (packets[i].is_key) keys.push_back(static_cast<int32_t>(i));
        if (packets[i].is_cut) cuts_.push_back(static_cast<int32_t>(i) - (packets[i].is_second_field ? 1 : 0));
    }
    if (keys.empty() && !packets.empty()) keys.push_back(0);

    shown.clear();
    for (size_t i = 0; i < (has_times ? by_pts_.size() : packets.size()); ++i) {
        const int32_t packet = has_times ? by_pts_[i] : static_cast<int32_t>(i);
        // Nothing before the first key, in either order, can be decoded.
        const bool is_lost = has_times && (packet < keys[0] || packets[packet].pts < packets[keys[0]].pts);
        if (packets[packet].is_shown && !is_lost) shown.push_back(packet);
    }
}

int32_t Index::find(int64_t pts) const {
    const auto found = std::lower_bound(by_pts_.begin(), by_pts_.end(), pts,
                                        [this](int32_t packet, int64_t value) { return packets[packet].pts < value; });
    return found != by_pts_.end() && packets[*found].pts == pts ? *found : -1;
}

int Index::key_before(int32_t packet) const {
    if (!has_times) return 0;
    int key = static_cast<int>(std::upper_bound(keys.begin(), keys.end(), packet) - keys.begin()) - 1;
    // A frame shown before a key that it follows in the file refers to frames before that key (open GOP).
    while (key > 0 && packets[keys[key]].pts > packets[packet].pts) --key;
    return std::max(key, 0);
}

int32_t Index::last_packet_of(int32_t packet) const {
    const auto next = static_cast<size_t>(packet) + 1;
    return next < packets.size() && packets[next].is_second_field ? packet + 1 : packet;
}

bool Index::is_spoiled(int32_t packet) const {
    const auto cut = std::lower_bound(cuts_.begin(), cuts_.end(), keys[key_before(packet)]);
    return cut != cuts_.end() && *cut <= packet;
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
    keep_lower_layers(reading, index.get());
    join_fields(reading, index.get());
    find_early_end(demuxer, reading, index.get());
    find_lost_chunks(demuxer, index.get());
    index->arrange();
    if (!index->has_times) find_lost_pictures(reading, index.get());
    index->read_s = std::chrono::duration<double>(Watch::Clock::now() - started).count();
    return {{}, std::move(index)};
}

}  // namespace video
