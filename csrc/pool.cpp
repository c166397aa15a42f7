#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace video {

void run_tasks(const std::vector<std::function<void()>>& tasks, int num_threads, const std::function<void()>& poll) {
    constexpr auto kPollEvery = std::chrono::milliseconds(50);
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    size_t num_running = std::min(tasks.size(), static_cast<size_t>(num_threads));
    const auto work = [&] {
        for (size_t i = next++; i < tasks.size(); i = next++) tasks[i]();
        const std::lock_guard<std::mutex> lock(mutex);
        if (--num_running == 0) finished.notify_one();
    };
    std::vector<std::thread> threads(num_running);
    for (std::thread& thread : threads) thread = std::thread(work);
    {
        std::unique_lock<std::mutex> lock(mutex);
        while (!finished.wait_for(lock, kPollEvery, [&] { return num_running == 0; })) {
            lock.unlock();
            poll();
            lock.lock();
        }
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace video
