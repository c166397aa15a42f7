#include <limits>

#include "file_bytes.h"
#include "holes.h"

namespace video {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

enum Id : uint32_t {
    kEbml = 0x1A45DFA3,
    kSegment = 0x18538067,
    kCluster = 0x1F43B675,
    kTracks = 0x1654AE6B,
    kTrack = 0xAE,
    kCodec = 0x86,
    kCodecHeader = 0x63A2,
};

struct Element {
    uint32_t id = 0;
    int64_t data = 0;
    int64_t end = 0;  // kUnknown: as far as its parts go
};

bool is_in_segment(uint32_t id) {
    constexpr uint32_t kIds[] = {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367};
    return id == kCluster || std::find(std::begin(kIds), std::end(kIds), id) != std::end(kIds);
}

bool is_in_cluster(uint32_t id) {
    constexpr uint32_t kIds[] = {0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0xAF, 0x5854};
    return std::find(std::begin(kIds), std::end(kIds), id) != std::end(kIds);
}

bool is_filler(uint32_t id) { return id == 0xEC || id == 0xBF; }

bool is_known(uint32_t id) {
    return id == kEbml || id == kSegment || is_in_segment(id) || is_in_cluster(id) || is_filler(id);
}

class Walk {
public:
    Walk(const std::string& path, const Watch& watch) : file_(path), watch_(watch) {}

    FileHoles run() {
        while (at_ < file_.size() && !watch_.expired()) {
            Element element;
            if (!find_element(at_, &element) || !enter(element)) {
                if (at_ >= segment_end_) break;  // something else stands behind the whole file
                if (!skip_hole()) break;
            }
        }
        found_.lacks_bytes = found_.lacks_bytes || (segment_end_ != kUnknown && segment_end_ > file_.size());
        return std::move(found_);
    }

private:
    // Matroska, RFC 8794: identifier and length are numbers whose leading zeros tell how long they are.
    bool find_element(int64_t at, Element* element) {
        constexpr int kMostIdBytes = 4, kMostSizeBytes = 8;
        const int id_bytes = number_bytes(at);
        if (id_bytes > kMostIdBytes) return false;
        const int size_bytes = number_bytes(at + id_bytes);
        const uint8_t* data = size_bytes > kMostSizeBytes ? nullptr : file_.get(at, id_bytes + size_bytes);
        if (!data) return false;
        element->id = 0;
        for (int i = 0; i < id_bytes; ++i) element->id = element->id << 8 | data[i];
        uint64_t size = data[id_bytes] & ((1u << (8 - size_bytes)) - 1);
        for (int i = 1; i < size_bytes; ++i) size = size << 8 | data[id_bytes + i];
        const uint64_t unknown = (uint64_t{1} << 7 * size_bytes) - 1;
        element->data = at + id_bytes + size_bytes;
        element->end = size == unknown ? kUnknown : element->data + static_cast<int64_t>(size);
        return true;
    }

    // 9 where no number can begin.
    int number_bytes(int64_t at) {
        const uint8_t* first = file_.get(at, 1);
        if (!first) return 9;
        int bytes = 1;
        while (bytes < 9 && !(*first & (0x100 >> bytes))) ++bytes;
        return bytes;
    }

    // False for what cannot stand here.
    bool enter(const Element& element) {
        const uint32_t id = element.id;
        const bool is_inside = at_ < cluster_end_;
        const bool is_part = is_inside && (is_in_cluster(id) || is_filler(id) || !is_known(id));
        if (!is_part && is_inside && cluster_end_ != kUnknown) return false;
        if (!is_part && (is_in_cluster(id) || (!is_known(id) && !is_followed(element)))) return false;
        if (is_part && element.end > cluster_end_) return false;
        if (is_part && !is_known(id) && !is_followed(element)) return false;
        if (!is_part) cluster_end_ = 0;
        if (id == kSegment || id == kCluster) {
            (id == kSegment ? segment_end_ : cluster_end_) = element.end;
            at_ = element.data;
            return true;
        }
        if (element.end == kUnknown) return false;
        if (id == kTracks && !compare_tracks(element)) {
            found_.other_file_at = at_;
            at_ = file_.size();
            return true;
        }
        if (element.end > file_.size()) (is_part ? found_.ends_in_packet : found_.lacks_bytes) = true;
        at_ = element.end;
        return true;
    }

    // Whether the codecs of this file are those of the first one, so that its decoders go on with it.
    bool compare_tracks(const Element& tracks) {
        std::string codecs;
        int64_t at = tracks.data;
        for (Element part; at < tracks.end && find_element(at, &part) && part.end <= tracks.end;) {
            const int64_t size = part.end - part.data;
            const uint8_t* data = size < FileBytes::kWindow ? file_.get(part.data, static_cast<int>(size)) : nullptr;
            if ((part.id == kCodec || part.id == kCodecHeader) && data) codecs.append(data, data + size);
            at = part.id == kTrack ? part.data : part.end;
        }
        if (codecs_.empty()) codecs_ = codecs;
        return codecs == codecs_;
    }

    // Whether an unknown element leads to a known one, as those of later versions of the format do.
    bool is_followed(const Element& element) {
        Element next;
        return element.end == file_.size() || (find_element(element.end, &next) && is_known(next.id));
    }

    // To the next cluster, as the demuxer does.
    bool skip_hole() {
        found_.holes.push_back({at_, true});
        cluster_end_ = 0;
        for (int64_t at = at_ + 1; const uint8_t* data = file_.get(at, 4); ++at) {
            if ((at & 0xffff) == 0 && watch_.expired()) return false;
            if (data[0] != kCluster >> 24 || data[1] != (kCluster >> 16 & 255) || data[2] != (kCluster >> 8 & 255) ||
                data[3] != (kCluster & 255)) {
                continue;
            }
            at_ = at;
            return true;
        }
        found_.lacks_bytes = true;
        return false;
    }

    FileBytes file_;
    const Watch& watch_;
    FileHoles found_;
    std::string codecs_;  // with their headers, of the first file
    int64_t at_ = 0;
    int64_t segment_end_ = kUnknown;
    int64_t cluster_end_ = 0;  // 0: in none
};

}  // namespace

FileHoles find_matroska_holes(const std::string& path, const Watch& watch) { return Walk(path, watch).run(); }

}  // namespace video
