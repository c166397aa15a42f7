// What bindings.cpp and nvdec_bindings.cpp share.
#pragma once

#include <pybind11/pybind11.h>

#include "batch.h"

namespace video {

// Sets the limits, threads and signal handling of a call from Python.
void prepare(CallOptions& options, int64_t max_frame_pixels, int num_threads);

// Runs `call` without the interpreter lock; a signal handler that raised goes on raising afterwards.
template <typename Call>
auto without_lock(Call call) {
    const pybind11::gil_scoped_release released;
    return call();
}

pybind11::tuple status_of(const Status& status);
pybind11::list answers_of(const std::vector<DecodeResult>& results);

void bind_nvdec(pybind11::module_& m);

}  // namespace video
