// The class Nvdec of tempsamp_fast._video; nvdec.py is its user.
#include "nvdec_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "nvdec_batch.h"

namespace py = pybind11;

namespace video {
namespace {

void check_process(const Nvdec& nvdec) {
    if (nvdec.is_usable()) return;
    throw std::runtime_error(
        "hardware decoders do not survive a fork: start worker processes with the method 'spawn', or decode on the CPU");
}

std::unique_ptr<Nvdec> open_nvdec(int ordinal, const std::string& libcuda, const std::string& libnvcuvid) {
    std::unique_ptr<Nvdec> nvdec;
    Status opened;
    {
        const py::gil_scoped_release released;
        opened = Nvdec::open(ordinal, libcuda, libnvcuvid, &nvdec);
    }
    if (!opened.ok()) throw std::runtime_error(opened.message);
    return nvdec;
}

py::list look(Nvdec& nvdec, const std::vector<std::shared_ptr<Index>>& indexes, const std::vector<double>& deadlines_s,
              int64_t max_frame_pixels, int num_threads) {
    check_process(nvdec);
    if (deadlines_s.size() != indexes.size()) throw py::value_error("one deadline per index is needed");
    CallOptions options;
    prepare(options, max_frame_pixels, num_threads);
    const std::vector<std::shared_ptr<const Index>> files(indexes.begin(), indexes.end());
    const auto kinds = without_lock([&] { return look_at_pictures(files, deadlines_s, options, nvdec); });
    if (options.cancelled) throw py::error_already_set();
    py::list answers;
    for (const PictureKind& kind : kinds) {
        const YuvCoefficients& c = kind.coefficients;
        answers.append(py::make_tuple(status_of(kind.status), kind.bit_depth,
                                      py::make_tuple(c.y_offset, c.y, c.v_red, c.u_green, c.v_green, c.u_blue)));
    }
    return answers;
}

DecodeRequest to_request(const py::dict& fields, int bit_depth) {
    DecodeRequest request;
    request.index = fields["index"].cast<std::shared_ptr<Index>>();
    request.frames = fields["frames"].cast<std::vector<int32_t>>();
    request.deadline_s = fields["deadline_s"].cast<double>();
    request.layout.temporal_patch_size = 1;
    request.layout.out = reinterpret_cast<uint8_t*>(fields["out"].cast<uintptr_t>());
    int64_t last = -1;
    for (int32_t frame : request.frames) {
        if (frame <= last || frame >= static_cast<int64_t>(request.index->shown.size())) {
            throw py::value_error("frames must rise and be in the index, got " + std::to_string(frame));
        }
        last = frame;
    }
    const SurfaceShape shape(*request.index, bit_depth);
    const int64_t bytes = static_cast<int64_t>(request.frames.size()) * shape.bytes();
    if (fields["out_bytes"].cast<int64_t>() != bytes) {
        throw py::value_error("out must hold exactly " + std::to_string(bytes) + " bytes");
    }
    return request;
}

py::list decode(Nvdec& nvdec, const std::vector<py::dict>& fields, uintptr_t stream, int64_t max_frame_pixels,
                int num_threads) {
    check_process(nvdec);
    CallOptions options;
    prepare(options, max_frame_pixels, num_threads);
    std::vector<int> bit_depths;
    std::vector<DecodeRequest> requests;
    for (const py::dict& request : fields) {
        bit_depths.push_back(request["bit_depth"].cast<int>());
        requests.push_back(to_request(request, bit_depths.back()));
    }
    const auto results = without_lock([&] {
        return decode_surfaces(requests, bit_depths, options, nvdec, reinterpret_cast<CUstream>(stream));
    });
    if (options.cancelled) throw py::error_already_set();
    return answers_of(results);
}

}  // namespace

void bind_nvdec(py::module_& m) {
    py::class_<Nvdec>(m, "Nvdec", "The hardware decoders of one CUDA device. RuntimeError, with the reason, if none.")
        .def(py::init(&open_nvdec), py::arg("ordinal"), py::kw_only(), py::arg("libcuda") = "libcuda.so.1",
             py::arg("libnvcuvid") = "libnvcuvid.so.1")
        .def_property_readonly("num_engines", &Nvdec::num_engines, "Decoders in hardware.")
        .def("look", &look, py::arg("indexes"), py::arg("deadlines_s"), py::kw_only(), py::arg("max_frame_pixels"),
             py::arg("num_threads"),
             "One ((code, message), bit depth, fixed-point YUV coefficients) per file, UNSUPPORTED if not for the GPU.")
        .def("decode", &decode, py::arg("requests"), py::kw_only(), py::arg("stream"), py::arg("max_frame_pixels"),
             py::arg("num_threads"),
             "Fill surfaces; one (states, (code, message), counts) per request, as the module's decode.");
}

}  // namespace video
