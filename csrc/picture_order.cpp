#include "picture_order.h"

#include <algorithm>
#include <utility>

namespace video {
namespace {

bool follows(const PictureOrder& next, const PictureOrder& picture) {
    const int expected = (picture.frame_number + (picture.is_reference ? 1 : 0)) % picture.frame_number_range;
    return next.is_known && (next.is_idr || next.frame_number == expected);
}

// Each reference picture raises the frame number by one (H.264 7.4.3).
void compare_frame_numbers(const std::vector<PictureOrder>& pictures, std::vector<size_t>* losses) {
    constexpr int kUnknown = -1;
    // A picture may make the numbers start anew after itself (memory_management_control_operation 5).
    constexpr int kLargestAnew = 1;
    int last_reference = kUnknown;
    for (size_t i = 0; i < pictures.size(); ++i) {
        const PictureOrder& picture = pictures[i];
        if (!picture.is_known || picture.allows_gaps) {
            last_reference = kUnknown;
            continue;
        }
        const bool can_tell = last_reference != kUnknown && !picture.is_idr && picture.frame_number > kLargestAnew;
        const int range = picture.frame_number_range;
        const int skipped = (picture.frame_number - last_reference - 1 + 2 * range) % range;
        const bool is_ahead = can_tell && skipped > 0 && skipped < range / 2;
        const bool goes_on = i + 1 < pictures.size() && follows(pictures[i + 1], picture);
        if (is_ahead && goes_on) losses->push_back(i);
        const bool is_damaged = is_ahead && !goes_on;
        if (picture.is_reference) last_reference = picture.frame_number;
        if (is_damaged) last_reference = kUnknown;
    }
}

using Count = std::pair<int, size_t>;  // picture order count and packet

// H.264 8.2.1.1, of the pictures [begin, end) that follow one that starts anew.
std::vector<Count> full_counts(const std::vector<PictureOrder>& pictures, size_t begin, size_t end) {
    std::vector<Count> counts;
    int base = 0;
    int last = 0;
    for (size_t i = begin; i < end; ++i) {
        const PictureOrder& picture = pictures[i];
        const int range = picture.count_range;
        int high = base;
        if (picture.count < last && last - picture.count >= range / 2) high += range;
        if (picture.count > last && picture.count - last > range / 2) high -= range;
        counts.emplace_back(high + picture.count, i);
        if (picture.is_reference) {
            base = high;
            last = picture.count;
        }
    }
    std::sort(counts.begin(), counts.end());
    return counts;
}

// Encoders count frames in even steps: a longer step is a lost frame. With many of them, or with counts that are taken
// twice or far off, it is the counts that cannot be relied on.
void compare_counts(const std::vector<Count>& counts, std::vector<size_t>* losses) {
    constexpr int kFewest = 8;
    constexpr int kOneInHowMany = 8;
    const auto size = static_cast<int>(counts.size());
    if (size < kFewest) return;
    std::vector<int> steps;
    for (int i = 1; i < size; ++i) steps.push_back(counts[i].first - counts[i - 1].first);
    const int step = *std::min_element(steps.begin(), steps.end());
    if (step <= 0 || std::any_of(steps.begin(), steps.end(), [step](int other) { return other % step; })) return;
    const int num_lost = (counts.back().first - counts.front().first) / step + 1 - size;
    if (num_lost > size / kOneInHowMany) return;
    size_t earliest = counts.back().second;
    for (int i = size - 1; i > 0; --i) {
        earliest = std::min(earliest, counts[i].second);
        if (steps[i - 1] != step) losses->push_back(earliest);
    }
}

}  // namespace

bool is_shown_before(const PictureOrder& next, const PictureOrder& picture) {
    if (!next.is_known || !picture.is_known || next.is_idr || next.count < 0 || picture.count < 0) return false;
    return (picture.count - next.count + next.count_range) % next.count_range - 1 < next.count_range / 2 - 1 &&
           picture.count != next.count;
}

std::vector<size_t> find_losses(const std::vector<PictureOrder>& pictures) {
    std::vector<size_t> losses;
    compare_frame_numbers(pictures, &losses);
    for (size_t begin = 0; begin < pictures.size();) {
        size_t end = begin + 1;
        while (end < pictures.size() && !pictures[end].is_idr) ++end;
        const auto has_count = [](const PictureOrder& picture) { return picture.is_known && picture.count >= 0; };
        if (std::all_of(pictures.begin() + begin, pictures.begin() + end, has_count)) {
            compare_counts(full_counts(pictures, begin, end), &losses);
        }
        begin = end;
    }
    std::sort(losses.begin(), losses.end());
    losses.erase(std::unique(losses.begin(), losses.end()), losses.end());
    return losses;
}

}  // namespace video
