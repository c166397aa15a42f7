// tempsamp_fast._video: native.py checks what users ask for, this only what would write out of bounds.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "nvdec_bindings.h"

namespace py = pybind11;

namespace video {

void prepare(CallOptions& options, int64_t max_frame_pixels, int num_threads) {
    options.limits.max_frame_pixels = max_frame_pixels;
    options.num_threads = num_threads;
    options.poll = [&options] {
        const py::gil_scoped_acquire held;
        if (!options.cancelled && PyErr_CheckSignals() != 0) options.cancelled = true;
    };
}

py::tuple status_of(const Status& status) { return py::make_tuple(name(status.code), status.message); }

py::list answers_of(const std::vector<DecodeResult>& results) {
    py::list answers;
    for (const DecodeResult& result : results) {
        py::dict counts;
        counts["decoded"] = result.counts.decoded;
        counts["dropped"] = result.counts.dropped;
        counts["seeks"] = result.counts.seeks;
        counts["back_offs"] = result.counts.back_offs;
        const py::array_t<uint8_t> states(static_cast<py::ssize_t>(result.states.size()),
                                          reinterpret_cast<const uint8_t*>(result.states.data()));
        answers.append(py::make_tuple(states, status_of(result.status), counts));
    }
    return answers;
}

namespace {

py::list index_paths(const std::vector<std::string>& paths, const std::vector<double>& deadlines_s,
                     int64_t max_frame_pixels, int64_t max_num_frames, int num_threads,
                     const std::string& index_folder) {
    CallOptions options;
    prepare(options, max_frame_pixels, num_threads);
    options.limits.max_num_frames = max_num_frames;
    options.index_folder = index_folder;
    if (deadlines_s.size() != paths.size()) throw py::value_error("one deadline per path is needed");
    const auto results = without_lock([&] { return index_files(paths, deadlines_s, options); });
    if (options.cancelled) throw py::error_already_set();
    py::list answers;
    for (const IndexResult& result : results) {
        answers.append(py::make_tuple(std::const_pointer_cast<Index>(result.index), status_of(result.status)));
    }
    return answers;
}

DecodeRequest to_request(const py::dict& fields) {
    DecodeRequest request;
    request.index = fields["index"].cast<std::shared_ptr<Index>>();
    request.frames = fields["frames"].cast<std::vector<int32_t>>();
    request.deadline_s = fields["deadline_s"].cast<double>();
    PatchLayout& layout = request.layout;
    layout.height = fields["height"].cast<int>();
    layout.width = fields["width"].cast<int>();
    layout.patch_size = fields["patch_size"].cast<int>();
    layout.temporal_patch_size = fields["temporal_patch_size"].cast<int>();
    layout.merge_size = fields["merge_size"].cast<int>();
    layout.mean = fields["mean"].cast<std::array<float, 3>>();
    layout.std = fields["std"].cast<std::array<float, 3>>();
    const auto dtype = fields["dtype"].cast<std::string>();
    if (dtype != "uint8" && dtype != "bfloat16" && dtype != "float32") throw py::value_error("unknown dtype " + dtype);
    layout.dtype = dtype == "uint8" ? DType::kUint8 : dtype == "bfloat16" ? DType::kBfloat16 : DType::kFloat32;
    layout.out = reinterpret_cast<uint8_t*>(fields["out"].cast<uintptr_t>());

    const int factor = layout.patch_size * layout.merge_size;
    if (layout.patch_size < 1 || layout.merge_size < 1 || layout.temporal_patch_size < 1 || layout.height < factor ||
        layout.width < factor || layout.height % factor != 0 || layout.width % factor != 0) {
        throw py::value_error("height and width must be positive multiples of patch_size * merge_size");
    }
    for (int32_t frame : request.frames) {
        if (frame < 0 || frame >= static_cast<int64_t>(request.index->shown.size())) {
            throw py::value_error("frame " + std::to_string(frame) + " is not in the index");
        }
    }
    const int64_t grids = (request.frames.size() + layout.temporal_patch_size - 1) / layout.temporal_patch_size;
    if (fields["out_bytes"].cast<int64_t>() != grids * layout.grid_bytes()) {
        throw py::value_error("out must hold exactly " + std::to_string(grids * layout.grid_bytes()) + " bytes");
    }
    return request;
}

py::list decode_requests(const std::vector<py::dict>& fields, int64_t max_frame_pixels, int num_threads,
                         const std::string& simd) {
    CallOptions options;
    prepare(options, max_frame_pixels, num_threads);
    options.kernels = find_kernels(simd);
    if (!options.kernels) throw py::value_error("simd '" + simd + "' is not usable on this processor");
    std::vector<DecodeRequest> requests;
    for (const py::dict& request : fields) requests.push_back(to_request(request));
    const auto results = without_lock([&] { return decode_files(requests, options); });
    if (options.cancelled) throw py::error_already_set();
    return answers_of(results);
}

// [2, num_frames], or [2, 0] where frames have no times.
py::array_t<int64_t> clock_of(const Index& index) {
    py::array_t<int64_t> ticks({py::ssize_t{2}, static_cast<py::ssize_t>(index.shown_times.size())});
    for (size_t i = 0; i < index.shown_times.size(); ++i) {
        ticks.mutable_at(0, i) = index.shown_times[i].begin;
        ticks.mutable_at(1, i) = index.shown_times[i].duration;
    }
    return ticks;
}

py::dict packets_of(const Index& index) {
    const auto size = static_cast<py::ssize_t>(index.packets.size());
    py::array_t<int64_t> pts(size), bytes(size);
    py::array_t<bool> key(size), shown(size), droppable(size), cut(size);
    py::array_t<uint8_t> reads(size), writes(size);
    for (py::ssize_t i = 0; i < size; ++i) {
        const IndexedPacket& packet = index.packets[i];
        pts.mutable_at(i) = packet.pts;
        bytes.mutable_at(i) = packet.size;
        key.mutable_at(i) = packet.is_key;
        shown.mutable_at(i) = packet.is_shown;
        droppable.mutable_at(i) = packet.is_droppable();
        reads.mutable_at(i) = packet.use.reads;
        writes.mutable_at(i) = packet.use.writes;
        cut.mutable_at(i) = packet.is_cut;
    }
    py::dict columns;
    columns["pts"] = pts;
    columns["bytes"] = bytes;
    columns["key"] = key;
    columns["shown"] = shown;
    columns["droppable"] = droppable;
    columns["reads"] = reads;
    columns["writes"] = writes;
    columns["cut"] = cut;
    return columns;
}

}  // namespace
}  // namespace video

PYBIND11_MODULE(_video, m) {
    using namespace video;
    av_log_set_level(AV_LOG_QUIET);
    m.doc() = "Indexing and decoding of video files into patches, without the interpreter lock.";

    py::class_<Index, std::shared_ptr<Index>>(m, "Index", "The packets of a file and what its header says.")
        .def_property_readonly("path", [](const Index& i) { return py::bytes(i.path); })
        .def_readonly("format", &Index::format)
        .def_readonly("codec", &Index::codec)
        .def_readonly("has_times", &Index::has_times, "Whether every packet has its own time stamp.")
        .def_readonly("has_false_times", &Index::has_false_times, "Whether its times are in the order of decoding.")
        .def_readonly("is_truncated", &Index::is_truncated)
        .def_readonly("read_s", &Index::read_s, "Seconds that reading the file took, 0 for a kept index.")
        .def_readonly("trouble", &Index::trouble, "What went wrong while the file was read.")
        .def_property_readonly("coded_size", [](const Index& i) { return py::make_tuple(i.height, i.width); })
        .def_property_readonly("size",
                               [](const Index& i) {
                                   const bool turned = i.orientation.transpose;
                                   return py::make_tuple(turned ? i.width : i.height, turned ? i.height : i.width);
                               },
                               "(height, width) as displayed.")
        .def_property_readonly("orientation",
                               [](const Index& i) {
                                   const Orientation& o = i.orientation;
                                   return py::make_tuple(o.transpose, o.mirror_x, o.mirror_y);
                               },
                               "(transpose, mirror_x, mirror_y): how a coded picture is turned for display.")
        .def_property_readonly("time_base",
                               [](const Index& i) { return py::make_tuple(i.time_base.num, i.time_base.den); },
                               "Seconds per tick as a fraction.")
        .def_property_readonly("frame_rate", [](const Index& i) { return av_q2d(i.frame_rate); },
                               "Frames per second as the header gives it, 0 where it does not.")
        .def_property_readonly("num_keys", [](const Index& i) { return i.keys.size(); })
        .def_property_readonly("num_frames", [](const Index& i) { return i.shown.size(); })
        .def_property_readonly("num_restarts", &Index::num_restarts, "How often the clock of the file starts again.")
        .def_readonly("num_left_out", &Index::num_left_out)
        .def_readonly("unapplied_degrees", &Index::unapplied_degrees, "A rotation for display that is no quarter turn.")
        .def_property_readonly("clock", clock_of,
                               "[2, num_frames] int64 ticks: begin and duration of each frame in order of "
                               "presentation, on one clock for the whole file; [2, 0] where frames have no times.")
        .def_property_readonly("packets", packets_of, "Columns of all packets in decoding order.");

    m.def("index", &index_paths, py::arg("paths"), py::arg("deadlines_s"), py::kw_only(), py::arg("max_frame_pixels"),
          py::arg("max_num_frames"), py::arg("num_threads"), py::arg("index_folder") = "",
          "One (Index or None, (code, message)) per path.");
    m.def("decode", &decode_requests, py::arg("requests"), py::kw_only(), py::arg("max_frame_pixels"),
          py::arg("num_threads"), py::arg("simd") = "",
          "One (states [frames] uint8: 0 missing, 1 good, 2 damaged; (code, message); counts) per request.");
    m.def("simd_levels", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
        return names;
    }, "Instruction sets that `decode` can use here, the fastest first.");
    bind_nvdec(m);
}
