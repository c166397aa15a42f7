// The fields of coded headers.
#pragma once

#include <cstdint>

namespace video {

// The first start code (0 0 1) at or after `from`, or `size`.
inline int find_start_code(const uint8_t* data, int size, int from) {
    for (int i = from; i + 3 <= size; ++i) {
        if (data[i + 2] > 1) {
            i += 2;
        } else if (data[i] == 0 && data[i + 1] == 0 && data[i + 2] == 1) {
            return i;
        }
    }
    return size;
}

// Bits, the most significant first; past the end every bit is 0.
class BitReader {
public:
    enum class Emulation : uint8_t { kNone, kPrevention };  // whether 0 0 3 stands for 0 0, as in a NAL unit

    BitReader(const uint8_t* data, int size, Emulation emulation = Emulation::kPrevention)
        : data_(data), size_(size), emulation_(emulation) {}

    unsigned bits(int count) {
        unsigned value = 0;
        while (count-- > 0) value = value << 1 | bit();
        return value;
    }

    unsigned exp_golomb() {
        int zeros = 0;
        while (zeros < 32 && position_ < size_ && !bit()) ++zeros;
        return zeros < 32 ? (1u << zeros) - 1 + bits(zeros) : 0;
    }

    int signed_exp_golomb() {
        const unsigned value = exp_golomb();
        return value & 1 ? static_cast<int>(value / 2 + 1) : -static_cast<int>(value / 2);
    }

private:
    unsigned bit() {
        if (position_ >= size_) return 0;
        if (shift_ == 8) {
            if (is_emulated()) ++position_;
            if (position_ >= size_) return 0;
        }
        const unsigned value = data_[position_] >> --shift_ & 1;
        if (shift_ == 0) {
            shift_ = 8;
            ++position_;
        }
        return value;
    }

    bool is_emulated() const {
        return emulation_ == Emulation::kPrevention && position_ >= 2 && data_[position_] == 3 &&
               !data_[position_ - 1] && !data_[position_ - 2];
    }

    const uint8_t* data_;
    int size_;
    Emulation emulation_;
    int position_ = 0;
    int shift_ = 8;
};

}  // namespace video
