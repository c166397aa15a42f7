#include "nvdec_driver.h"

#include <dlfcn.h>

namespace video {
namespace {

Status open_library(const std::string& name, void** library) {
    *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    return *library ? Status() : Status(Code::kUnsupported, std::string("no hardware decoder: ") + dlerror());
}

template <typename Function>
Status find(void* library, const std::string& library_name, const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library, name));
    return *function ? Status() : Status(Code::kUnsupported, "the driver is too old: " + library_name + " has no " + name);
}

}  // namespace

Status NvdecDriver::load(const std::string& libcuda, const std::string& libnvcuvid, NvdecDriver* driver) {
    void* library = nullptr;
    Status status = open_library(libcuda, &library);
#define VIDEO_FIND(function) \
    if (status.ok()) status = find(library, *name, #function, &driver->function);
    const std::string* name = &libcuda;
    VIDEO_CUDA_FUNCTIONS(VIDEO_FIND)
    if (status.ok()) status = open_library(libnvcuvid, &library);
    name = &libnvcuvid;
    VIDEO_CUVID_FUNCTIONS(VIDEO_FIND)
#undef VIDEO_FIND
    return status;
}

Status NvdecDriver::check(CUresult result, const char* call) const {
    if (result == CUDA_SUCCESS) return {};
    const char* name = nullptr;
    if (cuGetErrorName(result, &name) != CUDA_SUCCESS || !name) name = "unknown error";
    return {Code::kUnsupported, std::string(call) + ": " + name + " (" + std::to_string(result) + ")"};
}

}  // namespace video
