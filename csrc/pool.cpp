#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace video {

void run_tasks(const std::vector<std::function<void()>>& tasks, int num_threads, const std::function<void()>& poll) {
    constexpr auto kPollEvery = std::chrono::milliseconds(50);
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    size_t num_finished = 0;
    const auto work = [&] {
        for (size_t i = next++; i < tasks.size(); i = next++) tasks[i]();
        const std::lock_guard<std::mutex> lock(mutex);
        ++num_finished;
        finished.notify_one();
    };
    std::vector<std::thread> threads;
    threads.reserve(num_threads);
    try {
        while (threads.size() < std::min(tasks.size(), static_cast<size_t>(num_threads))) threads.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do the work, without any the calling one.
        if (threads.empty()) work();
    }
    {
        std::unique_lock<std::mutex> lock(mutex);
        while (!finished.wait_for(lock, kPollEvery, [&] { return num_finished >= threads.size(); })) {
            lock.unlock();
            poll();
            lock.lock();
        }
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace video
