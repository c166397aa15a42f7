// Threads for the length of one call: nothing lives on that a fork could lose.
#pragma once

#include <functional>
#include <vector>

namespace video {

// Runs every task once, in order of start, on `num_threads` threads. `poll` is called now and then on the calling
// thread. Tasks must not throw.
void run_tasks(const std::vector<std::function<void()>>& tasks, int num_threads, const std::function<void()>& poll);

}  // namespace video
