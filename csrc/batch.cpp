#include "batch.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <new>

#include "index_cache.h"
#include "pool.h"

namespace video {
namespace {

// Units per thread: enough that the last ones to finish do not leave the others idle for long.
constexpr int kUnitsPerThread = 2;

// All frames of one file, or several parts that start at different keys.
std::vector<Unit> units_of(size_t number, const DecodeRequest& request, int max_units) {
    std::vector<std::pair<int32_t, int32_t>> frame_slots;
    for (size_t i = 0; i < request.frames.size(); ++i) {
        frame_slots.emplace_back(request.frames[i], static_cast<int32_t>(i));
    }
    std::sort(frame_slots.begin(), frame_slots.end());
    const Index& index = *request.index;
    const size_t least = (frame_slots.size() + max_units - 1) / max_units;
    std::vector<Unit> units;
    int last_key = -1;
    for (const auto& [frame, slot] : frame_slots) {
        const int key = index.key_before(index.shown[frame]);
        if (units.empty() || (units.back().frames.size() >= least && key > last_key)) {
            units.emplace_back();
            units.back().request = number;
        }
        Unit& unit = units.back();
        if (unit.frames.empty() || unit.frames.back() != frame) {
            unit.frames.push_back(frame);
            unit.slots.emplace_back();
        }
        unit.slots.back().push_back(slot);
        last_key = std::max(last_key, key);
    }
    // The last frame fills up its temporal patch.
    const int32_t num_frames = static_cast<int32_t>(request.frames.size());
    const int per_patch = request.layout.temporal_patch_size;
    for (Unit& unit : units) {
        for (std::vector<int32_t>& slots : unit.slots) {
            if (slots.back() != num_frames - 1) continue;
            for (int32_t slot = num_frames; slot % per_patch != 0; ++slot) slots.push_back(slot);
        }
    }
    return units;
}

// Fresh memory costs more to fault in by small pages than to fill with patches.
void prefer_large_pages([[maybe_unused]] const DecodeRequest& request) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
    const auto per_patch = static_cast<size_t>(request.layout.temporal_patch_size);
    const auto begin = reinterpret_cast<uintptr_t>(request.layout.out);
    const uintptr_t end = begin + (request.frames.size() + per_patch - 1) / per_patch * request.layout.grid_bytes();
    const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t last = end / kLargePage * kLargePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void decode_patches(const DecodeRequest& request, const CallOptions& options, const Watch& watch, Unit* unit) {
    PatchWriter writer(request.layout, request.index->orientation, *options.kernels);
    FrameReader reader(*request.index, options.limits, watch);
    const auto take = [&](const AVFrame& frame, size_t place) { return writer.write(frame, unit->slots[place]); };
    unit->status = reader.read(unit->frames, take, &unit->states);
    unit->counts = reader.counts();
}

void add(const Unit& unit, DecodeResult* result) {
    if (result->status.ok()) result->status = unit.status;
    result->counts.decoded += unit.counts.decoded;
    result->counts.dropped += unit.counts.dropped;
    result->counts.seeks += unit.counts.seeks;
    result->counts.back_offs += unit.counts.back_offs;
    for (size_t i = 0; i < unit.frames.size(); ++i) {
        for (int32_t slot : unit.slots[i]) {
            if (slot < static_cast<int32_t>(result->states.size())) result->states[slot] = unit.states[i];
        }
    }
}

IndexResult index_file(const std::string& path, const CallOptions& options, const Watch& watch) {
    if (options.index_folder.empty()) return read_index(path, options.limits, watch);
    if (std::shared_ptr<const Index> kept = load_index(options.index_folder, path)) {
        Status checked = check(*kept, options.limits);
        return {checked, checked.ok() ? kept : nullptr};
    }
    IndexResult result = read_index(path, options.limits, watch);
    if (result.index) store_index(options.index_folder, *result.index);
    return result;
}

}  // namespace

std::vector<IndexResult> index_files(const std::vector<std::string>& paths, const std::vector<double>& deadlines_s,
                                     CallOptions& options) {
    std::vector<IndexResult> results(paths.size());
    std::vector<std::function<void()>> tasks;
    for (size_t i = 0; i < paths.size(); ++i) {
        tasks.emplace_back([&, i] {
            Watch watch(options.cancelled);
            watch.start(deadlines_s[i]);
            try {
                results[i] = index_file(paths[i], options, watch);
            } catch (const std::bad_alloc&) {
                results[i].status = out_of_memory();
            }
        });
    }
    run_tasks(tasks, options.num_threads, options.poll);
    return results;
}

std::vector<DecodeResult> decode_files(const std::vector<DecodeRequest>& requests, CallOptions& options) {
    for (const DecodeRequest& request : requests) prefer_large_pages(request);
    return decode_units(requests, options, [&options](const DecodeRequest& request, Watch& watch, Unit* unit) {
        decode_patches(request, options, watch, unit);
    });
}

std::vector<DecodeResult> decode_units(const std::vector<DecodeRequest>& requests, CallOptions& options,
                                       const DecodeUnit& decode) {
    const int num_files = std::max<int>(1, static_cast<int>(requests.size()));
    const int wanted_units = options.num_threads == 1 ? 1 : kUnitsPerThread * options.num_threads;
    const int max_units = std::max(1, wanted_units / num_files);
    std::vector<Unit> units;
    std::deque<Watch> watches;
    std::vector<DecodeResult> results(requests.size());
    for (size_t i = 0; i < requests.size(); ++i) {
        for (Unit& unit : units_of(i, requests[i], max_units)) units.push_back(std::move(unit));
        watches.emplace_back(options.cancelled);
        results[i].states.resize(requests[i].frames.size(), FrameState::kMissing);
    }
    std::vector<std::function<void()>> tasks;
    for (Unit& unit : units) {
        tasks.emplace_back([&] {
            Watch& watch = watches[unit.request];
            watch.start(requests[unit.request].deadline_s);
            try {
                decode(requests[unit.request], watch, &unit);
            } catch (const std::bad_alloc&) {
                unit.status = out_of_memory();
            }
            unit.states.resize(unit.frames.size(), FrameState::kMissing);
        });
    }
    run_tasks(tasks, options.num_threads, options.poll);
    for (const Unit& unit : units) add(unit, &results[unit.request]);
    return results;
}

}  // namespace video
