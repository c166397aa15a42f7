#include "index.h"

#include <sys/stat.h>

#include <algorithm>
#include <numeric>

#include "bitstream.h"

namespace video {
namespace {

Orientation orientation_of(const AVStream* stream) {
    const int32_t* matrix = display_matrix(stream);
    if (!matrix) return {};
    // x' = m0 x + m3 y, y' = m1 x + m4 y: a quarter turn when the diagonal is zero. Other angles are not applied.
    if (matrix[0] == 0 && matrix[4] == 0 && matrix[1] != 0 && matrix[3] != 0) return {true, matrix[3] < 0, matrix[1] < 0};
    if (matrix[1] == 0 && matrix[3] == 0) return {false, matrix[0] < 0, matrix[4] < 0};
    return {};
}

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

struct Reading {
    std::vector<PacketTraits> traits;
    bool can_drop = true;
    int error = 0;
    bool is_corrupt = false;
};

Status read_packets(Demuxer& demuxer, const Limits& limits, const Watch& watch, Index* index, Reading* reading) {
    const PacketPtr packet(av_packet_alloc());
    if (!packet) return out_of_memory();
    BitstreamReader bitstream(demuxer.stream()->codecpar);
    while ((reading->error = demuxer.read(packet.get())) >= 0) {
        if (static_cast<int64_t>(index->packets.size()) >= limits.max_num_frames) {
            return {Code::kLimitExceeded, "has more than max_num_frames = " + std::to_string(limits.max_num_frames) + " frames"};
        }
        if (packet->size == 0) continue;
        const PacketTraits traits = bitstream.read(packet->data, packet->size);
        const bool is_discarded = packet->flags & AV_PKT_FLAG_DISCARD;
        reading->is_corrupt |= (packet->flags & AV_PKT_FLAG_CORRUPT) != 0;
        index->packets.push_back({packet->pts, packet->dts, packet->duration, packet->pos, packet->size,
                                  (packet->flags & AV_PKT_FLAG_KEY) != 0, !is_discarded && !traits.hidden, false});
        reading->traits.push_back(traits);
    }
    reading->can_drop = bitstream.can_drop();
    return watch.status();
}

// A picture that others of its layer do not refer to may still serve higher layers: only the highest can go.
void mark_droppable(const Reading& reading, Index* index) {
    if (!reading.can_drop) return;
    uint8_t highest = 0;
    for (const PacketTraits& traits : reading.traits) highest = std::max(highest, traits.temporal_id);
    for (size_t i = 0; i < reading.traits.size(); ++i) {
        const PacketTraits& traits = reading.traits[i];
        index->packets[i].is_droppable = traits.reference == Reference::kUnused && traits.temporal_id == highest;
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

void Index::arrange() {
    by_pts_.resize(packets.size());
    std::iota(by_pts_.begin(), by_pts_.end(), 0);
    std::stable_sort(by_pts_.begin(), by_pts_.end(),
                     [this](int32_t a, int32_t b) { return packets[a].pts < packets[b].pts; });
    has_times = true;
    for (size_t i = 0; i < by_pts_.size(); ++i) {
        const int64_t pts = packets[by_pts_[i]].pts;
        if (pts == IndexedPacket::kNone || (i > 0 && pts == packets[by_pts_[i - 1]].pts)) has_times = false;
    }
    keys.clear();
    for (size_t i = 0; i < packets.size(); ++i) {
        if (packets[i].is_key) keys.push_back(static_cast<int32_t>(i));
    }
    if (keys.empty() && !packets.empty()) keys.push_back(0);

    shown.clear();
    for (size_t i = 0; i < packets.size(); ++i) {
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

IndexResult read_index(const std::string& path, const Limits& limits, const Watch& watch) {
    Demuxer demuxer(watch);
    if (Status opened = demuxer.open(path); !opened.ok()) return {std::move(opened), nullptr};
    auto index = std::make_shared<Index>();
    index->path = path;
    struct stat file = {};
    if (stat(path.c_str(), &file) == 0) {
        index->file_size = file.st_size;
        index->modified_ns = nanoseconds(file.st_mtim);
    }
    describe(demuxer, index.get());
    if (int64_t{index->width} * index->height > limits.max_frame_pixels) {
        return {{Code::kLimitExceeded, std::to_string(index->width) + " x " + std::to_string(index->height) +
                                           " is over max_frame_pixels = " + std::to_string(limits.max_frame_pixels)},
                nullptr};
    }
    Reading reading;
    if (Status read = read_packets(demuxer, limits, watch, index.get(), &reading); !read.ok()) {
        return {std::move(read), nullptr};
    }
    mark_droppable(reading, index.get());
    // Only these containers list their packets before they hold them.
    const int promised = demuxer.is_format("mov") ? avformat_index_get_entries_count(demuxer.stream()) : 0;
    if (reading.error != AVERROR_EOF) index->trouble = error_text(reading.error);
    if (reading.is_corrupt) index->trouble = "a packet is cut or damaged";
    index->is_truncated = !index->trouble.empty() || static_cast<int>(index->packets.size()) < promised;
    index->arrange();
    return {{}, std::move(index)};
}

}  // namespace video
