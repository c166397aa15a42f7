#include "index_cache.h"

#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <type_traits>

namespace video {
namespace {

// Raised with every change of what is stored or of how a packet is judged.
constexpr uint32_t kVersion = 5;

uint64_t fnv1a(const std::string& text) {
    uint64_t hash = 14695981039346656037u;
    for (const unsigned char byte : text) hash = (hash ^ byte) * 1099511628211u;
    return hash;
}

std::string file_of(const std::string& folder, const std::string& path) {
    char name[32];
    std::snprintf(name, sizeof name, "/%016llx.index", static_cast<unsigned long long>(fnv1a(path)));
    return folder + name;
}

class Writer {
public:
    template <typename T>
    void operator()(const T& value) {
        static_assert(std::is_trivially_copyable_v<T>);
        bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
    void operator()(const std::string& text) {
        (*this)(static_cast<uint64_t>(text.size()));
        bytes += text;
    }
    void operator()(const std::vector<IndexedPacket>& packets) {
        (*this)(static_cast<uint64_t>(packets.size()));
        bytes.append(reinterpret_cast<const char*>(packets.data()), packets.size() * sizeof(IndexedPacket));
    }

    std::string bytes;
};

class Reader {
public:
    explicit Reader(const std::string& bytes) : bytes_(bytes) {}

    template <typename T>
    void operator()(T& value) {
        if (take(sizeof value)) std::memcpy(&value, bytes_.data() + at_ - sizeof value, sizeof value);
    }
    void operator()(std::string& text) {
        const uint64_t size = read_size(1);
        if (take(size)) text = bytes_.substr(at_ - size, size);
    }
    void operator()(std::vector<IndexedPacket>& packets) {
        const uint64_t size = read_size(sizeof(IndexedPacket));
        if (!take(size * sizeof(IndexedPacket))) return;
        packets.resize(size);
        std::memcpy(packets.data(), bytes_.data() + at_ - size * sizeof(IndexedPacket), size * sizeof(IndexedPacket));
    }
    bool is_whole() const { return ok_ && at_ == bytes_.size(); }

private:
    uint64_t read_size(size_t unit) {
        uint64_t size = 0;
        (*this)(size);
        if (size > bytes_.size() / unit) ok_ = false;
        return ok_ ? size : 0;
    }
    bool take(uint64_t count) {
        ok_ = ok_ && count <= bytes_.size() - at_;
        if (ok_) at_ += count;
        return ok_;
    }

    const std::string& bytes_;
    uint64_t at_ = 0;
    bool ok_ = true;
};

// What tells that an index belongs to a file as it is now.
template <typename Visitor, typename IndexType>
void visit_key(Visitor& visit, uint32_t& version, uint32_t& library, IndexType& index) {
    visit(version);
    visit(library);
    visit(index.path);
    visit(index.file_size);
    visit(index.modified_ns);
}

template <typename Visitor, typename IndexType>
void visit_contents(Visitor& visit, IndexType& index) {
    visit(index.format);
    visit(index.codec);
    visit(index.width);
    visit(index.height);
    visit(index.orientation);
    visit(index.unapplied_degrees);
    visit(index.clock_bits);
    visit(index.decoder_delay);
    visit(index.has_false_times);
    visit(index.time_base);
    visit(index.frame_rate);
    visit(index.is_truncated);
    visit(index.trouble);
    visit(index.packets);
}

}  // namespace

std::shared_ptr<const Index> load_index(const std::string& folder, const std::string& path) {
    struct stat file = {};
    if (stat(path.c_str(), &file) != 0) return nullptr;
    std::ifstream stream(file_of(folder, path), std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    if (bytes.size() < sizeof(uint64_t)) return nullptr;
    uint64_t checksum = 0;
    std::memcpy(&checksum, bytes.data() + bytes.size() - sizeof checksum, sizeof checksum);
    bytes.resize(bytes.size() - sizeof checksum);
    if (fnv1a(bytes) != checksum) return nullptr;

    auto index = std::make_shared<Index>();
    uint32_t version = 0;
    uint32_t library = 0;
    Reader reader(bytes);
    visit_key(reader, version, library, *index);
    const bool is_same = version == kVersion && library == avformat_version() && index->path == path &&
                         index->file_size == file.st_size && index->modified_ns == nanoseconds(file.st_mtim);
    if (!is_same) return nullptr;
    visit_contents(reader, *index);
    if (!reader.is_whole()) return nullptr;
    index->arrange();
    return index;
}

void store_index(const std::string& folder, const Index& index) {
    Writer writer;
    uint32_t version = kVersion;
    uint32_t library = avformat_version();
    visit_key(writer, version, library, index);
    visit_contents(writer, index);
    writer(fnv1a(writer.bytes));
    // Others may read or write the same name now: it appears whole or not at all.
    static std::atomic<unsigned> counter{0};
    const std::string target = file_of(folder, index.path);
    const std::string fresh = target + "." + std::to_string(getpid()) + "." + std::to_string(counter++);
    std::ofstream stream(fresh, std::ios::binary);
    stream.write(writer.bytes.data(), static_cast<std::streamsize>(writer.bytes.size()));
    stream.close();
    if (!stream || std::rename(fresh.c_str(), target.c_str()) != 0) std::remove(fresh.c_str());
}

}  // namespace video
