#include "index.h"

#include <algorithm>
#include <limits>

namespace video {
namespace {

// Frames that may come before one that is shown earlier (H.264 A.3.1, HEVC A.4.2: of a decoder's memory for pictures).
constexpr size_t kMostReordered = 16;

// The largest of the times so far.
class LatestTimes {
public:
    size_t count_after(int64_t time) const { return times_.end() - std::upper_bound(times_.begin(), times_.end(), time); }
    bool is_before_by(int64_t ticks, int64_t time) const { return !times_.empty() && time - times_.back() > ticks; }
    void clear() { times_.clear(); }
    void add(int64_t time) {
        times_.insert(std::upper_bound(times_.begin(), times_.end(), time), time);
        if (times_.size() > kMostReordered + 1) times_.erase(times_.begin());
    }

private:
    std::vector<int64_t> times_;  // ascending
};

// Half the range of a clock: a longer step forward is one back.
int64_t half_range(int clock_bits) {
    return clock_bits < 63 ? int64_t{1} << (clock_bits - 1) : std::numeric_limits<int64_t>::max();
}

// From the last frame but one to the last.
int64_t last_step(const std::vector<ShownTime>& times) {
    return times.size() > 1 ? times.back().begin - times[times.size() - 2].begin : 1;
}

// After the last frame; one that does not say how long it lasts takes as long as the one before.
int64_t end_of(const std::vector<ShownTime>& times) {
    return times.back().begin + (times.back().duration > 0 ? times.back().duration : last_step(times));
}

}  // namespace

void Index::arrange() {
    has_any_pts_ = std::any_of(packets.begin(), packets.end(),
                               [](const IndexedPacket& packet) { return packet.pts != IndexedPacket::kNone; });
    keys.clear();
    cuts_.clear();
    by_pts_.clear();
    for (int32_t i = 0; i < static_cast<int32_t>(packets.size()); ++i) {
        if (packets[i].is_key) keys.push_back(i);
        if (packets[i].is_cut) cuts_.push_back(i - (packets[i].is_second_field ? 1 : 0));
        if (packets[i].pts != IndexedPacket::kNone) by_pts_.push_back(i);
    }
    if (keys.empty() && !packets.empty()) keys.push_back(0);
    std::stable_sort(by_pts_.begin(), by_pts_.end(),
                     [this](int32_t a, int32_t b) { return packets[a].pts < packets[b].pts; });
    find_parts();
    find_lost();
    sort_shown();
    join_clocks();
}

// What comes before a key is shown before it, and no frame overtakes more than a decoder can hold back: else the clock
// has started again.
void Index::find_parts() {
    parts_.assign(1, {0});
    reorder_depth = 0;
    LatestTimes latest;
    for (int32_t i = 0; i < static_cast<int32_t>(packets.size()); ++i) {
        const int64_t time = raw_time(i);
        if (time == IndexedPacket::kNone || packets[i].is_second_field) continue;
        size_t num_later = latest.count_after(time);
        const bool is_back = num_later > (packets[i].is_key ? 0 : kMostReordered);
        if (is_back || latest.is_before_by(half_range(clock_bits), time)) {
            parts_.push_back({i});
            // What it refers to may be another file's.
            if (!packets[i].is_key) cuts_.insert(std::upper_bound(cuts_.begin(), cuts_.end(), i), i);
            latest.clear();
            num_later = 0;
        }
        reorder_depth = std::max(reorder_depth, static_cast<int>(num_later));
        latest.add(time);
    }
}

// Nothing before the first key of a part, in either order, can be decoded. Pictures that are shown before it come right
// after it, some without a time.
void Index::find_lost() {
    is_lost_.assign(packets.size(), false);
    if (!has_any_pts_) return;
    for (size_t part = 0; part < parts_.size(); ++part) {
        const int32_t first = parts_[part].first;
        const auto end = static_cast<int32_t>(part + 1 < parts_.size() ? parts_[part + 1].first : packets.size());
        const int32_t key = part == 0 ? keys[0] : first;
        if (!packets[key].is_key) continue;
        std::fill(is_lost_.begin() + first, is_lost_.begin() + key, true);
        bool may_lead = true;
        for (int32_t i = key + 1; i < end; ++i) {
            const int64_t pts = packets[i].pts;
            if (pts > packets[key].pts) may_lead = false;
            const bool leads = pts == IndexedPacket::kNone ? may_lead : pts < packets[key].pts;
            is_lost_[i] = leads && !packets[i].is_decodable_leading;
        }
    }
}

void Index::sort_shown() {
    std::vector<int32_t> order;
    shown.clear();
    has_times = !has_false_times;
    for (int32_t i = 0; i < static_cast<int32_t>(packets.size()); ++i) {
        if (!packets[i].is_shown) continue;
        shown.push_back(i);
        if (is_lost_[i]) continue;
        order.push_back(i);
        if (packets[i].pts == IndexedPacket::kNone) has_times = false;
    }
    const auto is_before = [this](int32_t a, int32_t b) {
        const size_t part_a = part_of(a), part_b = part_of(b);
        return part_a != part_b ? part_a < part_b : packets[a].pts < packets[b].pts;
    };
    std::stable_sort(order.begin(), order.end(), is_before);
    for (size_t i = 1; i < order.size(); ++i) {
        if (!is_before(order[i - 1], order[i])) has_times = false;
    }
    num_left_out = has_times ? static_cast<int>(shown.size() - order.size()) : 0;
    if (has_times) shown = std::move(order);
}

// Each part begins where the one before ends, unless it says later.
void Index::join_clocks() {
    shown_times.clear();
    const bool has_pts = !has_false_times && std::all_of(shown.begin(), shown.end(), [this](int32_t packet) {
        return packets[packet].pts != IndexedPacket::kNone;
    });
    int64_t end = 0;
    for (size_t part = 0, next = 0; next < shown.size(); ++part) {
        std::vector<ShownTime> times;
        for (; next < shown.size() && part_of(shown[next]) == part; ++next) {
            const IndexedPacket& packet = packets[shown[next]];
            times.push_back({has_pts ? packet.pts : packet.dts, packet.duration});
        }
        if (times.empty()) continue;
        std::sort(times.begin(), times.end(), [](const ShownTime& a, const ShownTime& b) { return a.begin < b.begin; });
        if (times[0].begin == IndexedPacket::kNone) {
            shown_times.clear();
            return;
        }
        if (!has_pts) delay(&times);
        const bool is_later = times[0].begin >= end && times[0].begin - end <= half_range(clock_bits);
        parts_[part].shift = shown_times.empty() || is_later ? 0 : end - times[0].begin;
        for (ShownTime& time : times) time.begin += parts_[part].shift;
        shown_times.insert(shown_times.end(), times.begin(), times.end());
        end = end_of(times);
    }
}

// Decoding times become times of presentation: a frame comes out when later packets go in. The first stays where it is.
void Index::delay(std::vector<ShownTime>* times) const {
    const int64_t begin = times->front().begin;
    for (int i = 0; i < decoder_delay; ++i) {
        times->push_back({times->back().begin + last_step(*times), times->back().duration});
        times->erase(times->begin());
    }
    const int64_t late = times->front().begin - begin;
    for (ShownTime& time : *times) time.begin -= late;
}

size_t Index::part_of(int32_t packet) const {
    const auto next = std::upper_bound(parts_.begin(), parts_.end(), packet,
                                       [](int32_t value, const Part& part) { return value < part.first; });
    return next - parts_.begin() - 1;
}

int64_t Index::time_of(int32_t packet) const {
    const int64_t pts = packets[packet].pts;
    return pts == IndexedPacket::kNone ? pts : pts + parts_[part_of(packet)].shift;
}

int32_t Index::find(const AVPacket& packet, int32_t expected) const {
    const auto is_it = [&](int32_t i) {
        const IndexedPacket& known = packets[i];
        return known.pts == packet.pts && known.size == packet.size && known.byte_position == packet.pos;
    };
    if (expected >= 0 && expected < static_cast<int32_t>(packets.size()) && is_it(expected)) return expected;
    const auto [begin, end] = with_pts(packet.pts);
    if (end - begin == 1) return *begin;
    const auto found = std::find_if(begin, end, is_it);
    return found == end ? -1 : *found;
}

int32_t Index::find(int64_t pts) const {
    const auto [begin, end] = with_pts(pts);
    return end - begin == 1 ? *begin : -1;
}

std::pair<const int32_t*, const int32_t*> Index::with_pts(int64_t pts) const {
    const auto found = std::equal_range(by_pts_.begin(), by_pts_.end(), -1, [&](int32_t a, int32_t b) {
        return (a < 0 ? pts : packets[a].pts) < (b < 0 ? pts : packets[b].pts);
    });
    const int32_t* begin = by_pts_.data() + (found.first - by_pts_.begin());
    return {begin, begin + (found.second - found.first)};
}

int Index::key_before(int32_t packet) const {
    if (!has_times) return 0;
    int key = static_cast<int>(std::upper_bound(keys.begin(), keys.end(), packet) - keys.begin()) - 1;
    // A frame shown before a key that it follows in the file refers to frames before that key (open GOP).
    while (key > 0 && time_of(keys[key]) > time_of(packet)) --key;
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

}  // namespace video
