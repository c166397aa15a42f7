// Bytes of a file by their place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace video {

class FileBytes {
public:
    explicit FileBytes(const std::string& path) : file_(path, std::ios::binary) {
        file_.seekg(0, std::ios::end);
        size_ = std::max<int64_t>(file_.tellg(), 0);
    }

    int64_t size() const { return size_; }

    // The `count` bytes at `at`, at most kWindow, until the next call; null where the file ends before.
    const uint8_t* get(int64_t at, int count) {
        if (at < 0 || at > size_ - count) return nullptr;
        const bool is_here = at >= begin_ && at + count <= begin_ + static_cast<int64_t>(window_.size());
        if (!is_here) {
            begin_ = at;
            window_.resize(static_cast<size_t>(std::min<int64_t>(kWindow, size_ - at)));
            file_.clear();
            file_.seekg(at);
            file_.read(reinterpret_cast<char*>(window_.data()), static_cast<std::streamsize>(window_.size()));
            if (!file_) return nullptr;  // the file was cut meanwhile
        }
        return window_.data() + (at - begin_);
    }

    static constexpr int kWindow = 1 << 15;

private:
    std::ifstream file_;
    int64_t size_ = 0;
    int64_t begin_ = 0;
    std::vector<uint8_t> window_;
};

}  // namespace video
