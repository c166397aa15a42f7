// libFuzzer target: any bytes as a video file, through index, decoder and patches. `make -C tests/video/fuzz`.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "../../../csrc/batch.h"

using namespace video;

namespace {

constexpr double kDeadline = 2.0;
constexpr int32_t kMaxFrames = 6;
constexpr int kSize = 28;

void decode(const std::shared_ptr<const Index>& index, const Limits& limits) {
    DecodeRequest request;
    request.index = index;
    request.deadline_s = kDeadline;
    const auto num_frames = static_cast<int32_t>(index->shown.size());
    for (int32_t frame = 0; frame < num_frames; frame += num_frames / kMaxFrames + 1) request.frames.push_back(frame);
    if (request.frames.empty()) return;
    request.layout.height = request.layout.width = kSize;
    request.layout.mean.fill(127.5f);
    request.layout.std.fill(127.5f);
    std::vector<uint8_t> out((request.frames.size() + 1) / 2 * request.layout.grid_bytes());
    request.layout.out = out.data();
    CallOptions options;
    options.limits = limits;
    options.kernels = find_kernels("");
    options.poll = [] {};
    decode_files({request}, options);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    av_log_set_level(AV_LOG_QUIET);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const int file = memfd_create("video", 0);
    if (file < 0 || write(file, data, size) != static_cast<ssize_t>(size)) return -1;
    const std::string path = "/proc/self/fd/" + std::to_string(file);
    const Limits limits = {int64_t{1} << 20, 2000};
    const std::atomic<bool> cancelled{false};
    Watch watch(cancelled);
    watch.start(kDeadline);
    if (const IndexResult result = read_index(path, limits, watch); result.index) decode(result.index, limits);
    close(file);
    return 0;
}
