// The two calls of the extension: index files, and decode chosen frames of indexed files into patches.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "frame_reader.h"
#include "patches.h"

namespace video {

struct CallOptions {
    Limits limits;
    int num_threads = 1;
    std::string index_folder;  // where indexes are kept; "": nowhere
    const Kernels* kernels = nullptr;
    std::function<void()> poll;  // on the calling thread; may set `cancelled`
    std::atomic<bool> cancelled{false};
};

struct DecodeRequest {
    std::shared_ptr<const Index> index;
    std::vector<int32_t> frames;  // place in order of presentation of each frame of the patches; may repeat
    PatchLayout layout;
    double deadline_s = 0.0;
};

// A part of the wanted frames of one file: what one thread decodes at a time.
struct Unit {
    size_t request = 0;
    std::vector<int32_t> frames;              // ascending, distinct
    std::vector<std::vector<int32_t>> slots;  // where each goes in the patches
    std::vector<FrameState> states;
    Status status;
    ReadCounts counts;
};

struct DecodeResult {
    Status status;
    std::vector<FrameState> states;  // one per requested frame
    ReadCounts counts;
};

std::vector<IndexResult> index_files(const std::vector<std::string>& paths, const std::vector<double>& deadlines_s,
                                     CallOptions& options);
std::vector<DecodeResult> decode_files(const std::vector<DecodeRequest>& requests, CallOptions& options);

// Cuts the requests into units, at key frames, and has `decode` fill in what became of each, on `num_threads` threads.
using DecodeUnit = std::function<void(const DecodeRequest&, Watch&, Unit*)>;
std::vector<DecodeResult> decode_units(const std::vector<DecodeRequest>& requests, CallOptions& options,
                                       const DecodeUnit& decode);

}  // namespace video
