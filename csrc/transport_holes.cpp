#include <cstring>

#include "file_bytes.h"
#include "holes.h"

namespace video {
namespace {

constexpr int kPacket = 188, kSync = 0x47;

// Bytes of a packet's adaptation field that are there only to fill it up (ISO/IEC 13818-1, 2.4.3.4).
int stuffing_of(const uint8_t* packet) {
    if (!(packet[3] & 0x20)) return 0;
    const int length = packet[4];
    if (length == 0) return 1;
    const int flags = packet[5];
    int used = 1 + (flags & 0x10 ? 6 : 0) + (flags & 0x08 ? 6 : 0) + (flags & 0x04 ? 1 : 0);
    for (const int flag : {0x02, 0x01}) {
        if (flags & flag && 5 + used < kPacket) used += 1 + packet[5 + used];
    }
    return length - used;
}

// One stream, packet after packet.
class Counter {
public:
    void count(const uint8_t* packet, int64_t at, FileHoles* found) {
        const bool starts = packet[1] & 0x40;
        const bool is_damaged = packet[1] & 0x80;
        const bool has_field = packet[3] & 0x20;
        const bool may_jump = has_field && packet[4] > 0 && packet[5] & 0x80;
        const int number = packet[3] & 15;
        found->is_encrypted = found->is_encrypted || (packet[3] & 0xc0) != 0;
        if (!(packet[3] & 0x10)) return;
        const bool is_next = last_ < 0 || may_jump || number == ((last_ + 1) & 15);
        if (is_damaged || !is_next) found->holes.push_back({at, is_damaged || !starts || !is_whole()});
        last_ = number;
        const int payload = 4 + (has_field ? 1 + packet[4] : 0);
        if (starts) {
            const bool is_long_enough = payload + 6 <= kPacket;
            promised_ = is_long_enough ? packet[payload + 4] << 8 | packet[payload + 5] : 0;
            if (promised_ > 0) promised_ += 6;
            bytes_ = 0;
        }
        bytes_ += std::max(kPacket - payload, 0);
        ends_stuffed_ = stuffing_of(packet) > 0;
    }

    // Whether the last unit of the stream ends where it should; of one that does not tell its length, its last packet
    // is filled up unless it happens to be full.
    bool is_whole() const { return promised_ > 0 ? bytes_ >= promised_ : ends_stuffed_; }
    bool is_short() const { return promised_ > 0 && bytes_ < promised_; }

private:
    int last_ = -1;
    int promised_ = 0;  // bytes of the unit, 0 where it does not tell
    int64_t bytes_ = 0;
    bool ends_stuffed_ = false;
};

}  // namespace

FileHoles find_transport_holes(const std::string& path, int packet_bytes, int pid, const Watch& watch) {
    FileBytes file(path);
    FileHoles found;
    Counter counter;
    const int lead = packet_bytes == 192 ? 4 : 0;  // a time stamp before each packet
    int64_t at = 0;
    int64_t strange_at = -1;  // since where the bytes are no packets
    for (int64_t step = 0; !watch.expired() || step % 4096; ++step) {
        const uint8_t* packet = file.get(at + lead, kPacket);
        if (!packet) break;
        // After other bytes, one of this value may be chance.
        const uint8_t* next = strange_at < 0 ? nullptr : file.get(at + packet_bytes + lead, 1);
        const bool is_chance = next && *next != kSync;
        packet = file.get(at + lead, kPacket);
        if (packet[0] != kSync || is_chance) {
            if (strange_at < 0) strange_at = at;
            ++at;
            continue;
        }
        if (strange_at > 0) found.holes.push_back({strange_at, true});
        strange_at = -1;
        if (((packet[1] & 31) << 8 | packet[2]) == pid) counter.count(packet, at, &found);
        at += packet_bytes;
    }
    const uint8_t* rest = strange_at < 0 ? file.get(at + lead, 1) : nullptr;
    found.ends_in_packet = counter.is_short() || (rest && *rest == kSync);
    return found;
}

}  // namespace video
