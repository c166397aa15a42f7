// The clock and the cancel switch that every loop and every FFmpeg read looks at.
#pragma once

#include <atomic>
#include <chrono>
#include <limits>

#include "status.h"

namespace video {

// What one file may cost; see `Limits` in tempsamp_fast/video/result.py.
struct Limits {
    int64_t max_frame_pixels = int64_t{1} << 25;
    int64_t max_num_frames = 2'000'000;

    // What a decoder is told, for FFmpeg counts rows with their padding.
    int64_t padded_pixels() const { return max_frame_pixels + max_frame_pixels / 2; }
};

class Watch {
public:
    using Clock = std::chrono::steady_clock;

    explicit Watch(const std::atomic<bool>& cancelled) : cancelled_(&cancelled) {}

    // Starts the clock on the first call only: the units of one file share a deadline.
    void start(double seconds) {
        int64_t none = kNotStarted;
        const bool unbounded = !(seconds < 1e9);
        const int64_t end = unbounded ? kNever : now_ns() + static_cast<int64_t>(seconds * 1e9);
        deadline_ns_.compare_exchange_strong(none, end);
    }

    bool expired() const {
        return cancelled_->load(std::memory_order_relaxed) || now_ns() > deadline_ns_.load(std::memory_order_relaxed);
    }

    Status status() const {
        if (cancelled_->load()) return {Code::kCancelled, "cancelled"};
        if (expired()) return {Code::kDeadline, "the deadline passed"};
        return {};
    }

    static int interrupt(void* watch) { return static_cast<const Watch*>(watch)->expired(); }

private:
    static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
    static constexpr int64_t kNotStarted = kNever - 1;

    static int64_t now_ns() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
    }

    const std::atomic<bool>* cancelled_;
    std::atomic<int64_t> deadline_ns_{kNotStarted};
};

}  // namespace video
