// A libcuda whose device memory is the host's. Copies run when something waits for them, as on a busy GPU.
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "fake.h"

namespace {

constexpr CUresult kInvalidValue = static_cast<CUresult>(1);
constexpr CUresult kInvalidContext = static_cast<CUresult>(201);

std::recursive_mutex mutex;
std::map<std::string, long> numbers;
thread_local std::vector<CUcontext> contexts;
int the_context;

struct Work {
    long number;
    std::function<void()> run;
};
struct Event {
    CUstream stream = nullptr;
    long number = 0;  // of the last work before it
};
std::map<CUstream, std::deque<Work>> streams;
long last_work = 0;

void run_until(CUstream stream, long number) {
    auto& queue = streams[stream];
    while (!queue.empty() && queue.front().number <= number) {
        queue.front().run();
        queue.pop_front();
    }
}

}  // namespace

using Lock = std::lock_guard<std::recursive_mutex>;

extern "C" {

void fake_set(const char* name, long value) {
    const Lock lock(mutex);
    numbers[name] = value;
}
long fake_get(const char* name) {
    const Lock lock(mutex);
    const auto found = numbers.find(name);
    return found == numbers.end() ? 0 : found->second;
}
void fake_add(const char* name, long value) {
    const Lock lock(mutex);
    numbers[name] += value;
}
void fake_reset() {
    const Lock lock(mutex);
    numbers.clear();
}

CUresult fake_call(const char* call) {
    const Lock lock(mutex);
    const long number = numbers[call]++;
    const long error = fake_get((std::string("fail:") + call).c_str());
    return error && number >= fake_get((std::string("skip:") + call).c_str()) ? static_cast<CUresult>(error)
                                                                               : CUDA_SUCCESS;
}
CUresult fake_call_in_context(const char* call) {
    if (contexts.empty() || contexts.back() != reinterpret_cast<CUcontext>(&the_context)) return kInvalidContext;
    return fake_call(call);
}

CUresult cuInit(unsigned) { return fake_call("cuInit"); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? fake_call("cuDeviceGet") : static_cast<CUresult>(101);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    if (const CUresult error = fake_call("cuDevicePrimaryCtxRetain")) return error;
    *context = reinterpret_cast<CUcontext>(&the_context);
    fake_add("contexts", 1);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    fake_add("contexts", -1);
    return fake_call("cuDevicePrimaryCtxRelease");
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (const CUresult error = fake_call("cuCtxPushCurrent")) return error;
    contexts.push_back(context);
    fake_add("pushed", 1);
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (contexts.empty()) return kInvalidContext;
    *context = contexts.back();
    contexts.pop_back();
    fake_add("pushed", -1);
    return CUDA_SUCCESS;
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, CUstream stream) {
    if (const CUresult error = fake_call_in_context("cuMemcpy2DAsync")) return error;
    const CUDA_MEMCPY2D plane = *copy;
    if (plane.srcXInBytes + plane.WidthInBytes > plane.srcPitch || plane.WidthInBytes > plane.dstPitch) {
        return kInvalidValue;
    }
    const Lock lock(mutex);
    streams[stream].push_back({++last_work, [plane] {
        for (size_t y = 0; y < plane.Height; ++y) {
            std::memcpy(reinterpret_cast<char*>(plane.dstDevice) + (plane.dstY + y) * plane.dstPitch + plane.dstXInBytes,
                        reinterpret_cast<char*>(plane.srcDevice) + (plane.srcY + y) * plane.srcPitch + plane.srcXInBytes,
                        plane.WidthInBytes);
        }
    }});
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    const Lock lock(mutex);
    run_until(stream, last_work);
    return fake_call_in_context("cuStreamSynchronize");
}

CUresult cuEventCreate(CUevent* event, unsigned) {
    if (const CUresult error = fake_call_in_context("cuEventCreate")) return error;
    *event = reinterpret_cast<CUevent>(new Event);
    fake_add("events", 1);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
    delete reinterpret_cast<Event*>(event);
    fake_add("events", -1);
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    if (const CUresult error = fake_call_in_context("cuEventRecord")) return error;
    const Lock lock(mutex);
    *reinterpret_cast<Event*>(event) = {stream, last_work};
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    const Lock lock(mutex);
    const Event recorded = *reinterpret_cast<Event*>(event);
    run_until(recorded.stream, recorded.number);
    return fake_call_in_context("cuEventSynchronize");
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 999 ? "CUDA_ERROR_UNKNOWN" : nullptr;
    return *name ? CUDA_SUCCESS : kInvalidValue;
}

}  // extern "C"
