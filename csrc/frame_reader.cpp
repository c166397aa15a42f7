#include "frame_reader.h"

#include <algorithm>
#include <limits>

namespace video {
namespace {

// Reading on costs less than a seek up to about here.
constexpr int64_t kSeekBytes = 1 << 20;
// Packets that may go by before one that the index knows, after a seek.
constexpr int kMaxStrangers = 64;

bool is_flagged(const AVFrame& frame) { return frame.decode_error_flags != 0 || (frame.flags & AV_FRAME_FLAG_CORRUPT); }

}  // namespace

Status FrameReader::read(const std::vector<int32_t>& frames, const Take& take, std::vector<FrameState>* states) {
    states->assign(frames.size(), FrameState::kMissing);
    take_ = &take;
    states_ = states;
    if (Status opened = open(); !opened.ok()) return opened;
    if (!index_.has_times) return count_frames(frames);

    wanted_.clear();
    for (size_t i = 0; i < frames.size(); ++i) {
        const int32_t packet = index_.shown[frames[i]];
        if (index_.is_spoiled(packet)) {
            (*states)[i] = FrameState::kDamaged;
        } else {
            wanted_.push_back({packet, i});
        }
    }
    std::sort(wanted_.begin(), wanted_.end(), [](const Wanted& a, const Wanted& b) { return a.packet < b.packet; });
    const std::vector<Run> runs = plan();
    for (const Run& run : runs) {
        if (Status status = read_run(run, run.key); !status.ok()) return status;
        if (!is_out_of_order_) continue;
        states_->assign(frames.size(), FrameState::kMissing);
        if (Status opened = open(); !opened.ok()) return opened;
        return count_frames(frames);
    }
    // What is broken for good costs one decode from the start of the file, after everything else is safe.
    for (const Run& run : runs) {
        if (is_whole(run)) continue;
        if (Status status = retry(run); !status.ok()) return status.code == Code::kDeadline ? Status() : status;
        if (!is_whole(run)) break;
    }
    return {};
}

Status FrameReader::open() {
    demuxer_ = std::make_unique<Demuxer>(limits_, watch_);
    if (Status opened = demuxer_->open(index_.path); !opened.ok()) return opened;
    if (!decoder_) {
        // Where an H.264 stream does not say how many frames to hold back, the decoder would learn it by losing one.
        AVCodecParameters* codec = demuxer_->stream()->codecpar;
        const bool may_hold_back = codec->codec_id == AV_CODEC_ID_H264 && index_.has_times;
        if (may_hold_back) codec->video_delay = std::max(codec->video_delay, index_.reorder_depth);
        if (Status opened = open_decoder_(demuxer_->stream(), limits_, &decoder_); !opened.ok()) return opened;
    }
    packet_.reset(av_packet_alloc());
    if (!packet_) return out_of_memory();
    current_ = -1;
    expected_ = 0;
    is_pending_ = at_end_ = false;
    return {};
}

std::vector<FrameReader::Run> FrameReader::plan() const {
    std::vector<Run> runs;
    for (size_t i = 0; i < wanted_.size(); ++i) {
        const int key = index_.key_before(wanted_[i].packet);
        // A run that reaches past this key passes the frame on its way.
        if (!runs.empty() && wanted_[runs.back().end - 1].packet >= index_.keys[key]) {
            runs.back().end = i + 1;
        } else {
            runs.push_back({key, i, i + 1});
        }
    }
    return runs;
}

// Without time stamps of their own, frames are what they are by the order in which they come out. A lost one moves what
// follows, up to the next key, whose place the packets before it tell.
Status FrameReader::count_frames(const std::vector<int32_t>& frames) {
    enum class Outcome : uint8_t { kNone, kWhole, kBroken };
    const size_t num_packets = index_.packets.size();
    std::vector<Outcome> outcomes(num_packets, Outcome::kNone);
    std::vector<int32_t> place_at(num_packets, 0);  // of the next frame to come out when the packet went in
    size_t sent = 0;
    size_t settled = 0;  // packets
    int32_t num_settled = 0;  // frames of those
    int32_t place = 0;
    bool is_count_lost = false;  // after a cut, nobody knows how many frames are missing

    // What came out before a packet went in is shown before it, so a loss leaves that in place.
    const auto settle = [&](size_t end) {
        int32_t first_moved = std::numeric_limits<int32_t>::max();
        for (; settled < end; ++settled) {
            if (!index_.packets[settled].is_shown) continue;
            ++num_settled;
            if (outcomes[settled] != Outcome::kWhole) first_moved = std::min(first_moved, place_at[settled]);
        }
        for (size_t i = 0; i < frames.size(); ++i) {
            FrameState& state = (*states_)[i];
            if (frames[i] >= first_moved && state == FrameState::kGood) state = FrameState::kDamaged;
        }
    };
    const auto name = [&](const AVFrame& frame) {
        const auto packet = static_cast<size_t>(frame.pts);
        if (frame.pts < 0 || packet >= sent) return;
        const bool is_first = outcomes[packet] == Outcome::kNone;
        outcomes[packet] = is_first && !is_flagged(frame) ? Outcome::kWhole : Outcome::kBroken;
        if (!index_.packets[packet].is_key || packet <= settled) return;
        settle(packet);
        const auto is_out = [](Outcome outcome) { return outcome != Outcome::kNone; };
        const auto leading = std::count_if(outcomes.begin() + packet + 1, outcomes.begin() + sent, is_out);
        place = num_settled + static_cast<int32_t>(leading);
    };
    const Decoder::Take take = [&](const AVFrame& frame) -> Status {
        name(frame);
        const auto wanted = std::lower_bound(frames.begin(), frames.end(), place);
        if (wanted == frames.end() || *wanted != place++) return {};
        const size_t i = wanted - frames.begin();
        (*states_)[i] = is_count_lost ? FrameState::kDamaged : FrameState::kGood;
        return (*take_)(frame, i);
    };
    Status status;
    while (status.ok() && sent < num_packets && !frames.empty() && place <= frames.back()) {
        if (demuxer_->read(packet_.get()) < 0) break;
        ++counts_.decoded;
        packet_->pts = packet_->dts = static_cast<int64_t>(sent);
        place_at[sent] = place;
        is_count_lost = is_count_lost || index_.packets[sent].is_cut;
        ++sent;
        if (!decoder_->decode(packet_.get(), take, &status)) outcomes[sent - 1] = Outcome::kBroken;
    }
    if (watch_.expired()) return watch_.status();
    if (status.ok()) decoder_->decode(nullptr, take, &status);
    settle(sent);
    return status;
}

Status FrameReader::retry(const Run& run) {
    int key = run.key;
    for (int step = 1; key > 0 && !is_whole(run); step *= 2) {
        key = std::max(key - step, 0);
        ++counts_.back_offs;
        if (Status status = read_run(run, key); !status.ok()) return status;
    }
    return {};
}

Status FrameReader::read_run(const Run& run, int key) {
    const int32_t first = index_.keys[key];
    const int32_t last = index_.last_packet_of(wanted_[run.end - 1].packet);
    const std::vector<bool> needed = find_needed(first, last);
    if (Status moved = move_to(first); !moved.ok()) return moved;
    broken_.clear();
    Status status;
    int64_t latest = -1;  // packet of a frame
    const Decoder::Take take = [&](const AVFrame& frame) -> Status {
        if (is_flagged(frame)) broken_.push_back(static_cast<int32_t>(frame.pts));
        const bool is_back = latest >= 0 && frame.pts >= 0 && index_.time_of(frame.pts) <= index_.time_of(latest);
        if (is_back && broken_.empty()) is_out_of_order_ = true;
        latest = frame.pts;
        const Wanted* wanted = find_wanted(frame.pts);
        if (!wanted || (*states_)[wanted->place] == FrameState::kGood) return {};
        (*states_)[wanted->place] = FrameState::kGood;
        return (*take_)(frame, wanted->place);
    };
    while (status.ok() && !at_end_ && current_ <= last) {
        if (current_ >= first && !needed[current_ - first]) {
            ++counts_.dropped;
        } else {
            ++counts_.decoded;
            packet_->pts = packet_->dts = current_;
            packet_->flags &= ~AV_PKT_FLAG_CORRUPT;  // the index knows what that spoils
            if (!decoder_->decode(packet_.get(), take, &status) && current_ >= 0) {
                broken_.push_back(static_cast<int32_t>(current_) - (index_.packets[current_].is_second_field ? 1 : 0));
            }
        }
        if (!status.ok()) break;
        status = read_packet();
    }
    if (status.ok()) decoder_->decode(nullptr, take, &status);
    decoder_->reset();
    mark_damage(run);
    return status;
}

std::vector<bool> FrameReader::find_needed(int32_t first, int32_t last) const {
    std::vector<bool> needed(last - first + 1, false);
    uint8_t read_later = 0;
    for (int32_t packet = last; packet >= first; --packet) {
        const ReferenceUse use = index_.packets[packet].use;
        const bool is_wanted = find_wanted(packet) || index_.packets[packet].is_second_field;  // in part
        needed[packet - first] = is_wanted || (use.writes & read_later);
        if (needed[packet - first]) read_later = (read_later & ~use.writes) | use.reads;
    }
    needed[0] = true;  // tells the decoder what the stream is
    return needed;
}

// A broken picture spoils what is decoded after it, up to the next key; nothing more if no other refers to it.
void FrameReader::mark_damage(const Run& run) {
    std::sort(broken_.begin(), broken_.end());
    for (size_t i = run.begin; i < run.end; ++i) {
        FrameState& state = (*states_)[wanted_[i].place];
        if (state != FrameState::kGood) continue;
        const int32_t packet = wanted_[i].packet;
        const int32_t key = index_.keys[index_.key_before(packet)];
        for (auto broken = std::lower_bound(broken_.begin(), broken_.end(), key);
             broken != broken_.end() && *broken <= packet; ++broken) {
            if (*broken == packet || !index_.packets[*broken].is_droppable()) state = FrameState::kDamaged;
        }
    }
}

bool FrameReader::is_whole(const Run& run) const {
    return std::all_of(wanted_.begin() + run.begin, wanted_.begin() + run.end,
                       [this](const Wanted& wanted) { return (*states_)[wanted.place] == FrameState::kGood; });
}

const FrameReader::Wanted* FrameReader::find_wanted(int64_t packet) const {
    const auto found = std::lower_bound(wanted_.begin(), wanted_.end(), packet,
                                        [](const Wanted& wanted, int64_t value) { return wanted.packet < value; });
    return found != wanted_.end() && found->packet == packet ? &*found : nullptr;
}

Status FrameReader::read_packet() {
    is_pending_ = false;
    if (demuxer_->read(packet_.get()) < 0) {
        at_end_ = true;
        current_ = -1;
        return watch_.status();
    }
    is_pending_ = true;
    current_ = index_.find(*packet_, expected_);
    if (current_ >= 0) expected_ = static_cast<int32_t>(current_) + 1;
    return {};
}

Status FrameReader::move_to(int32_t target) {
    if (!is_pending_ && !at_end_) {
        if (Status read = read_packet(); !read.ok()) return read;
    }
    const int64_t position = is_pending_ && current_ >= 0 ? current_ : target + 1;
    const bool is_near = position <= target && index_.packets[target].byte_position -
                                                       index_.packets[position].byte_position < kSeekBytes;
    bool is_before = is_near;
    int key = index_.key_before(target);
    for (int step = 1; !is_before && key > 0; key -= step, step *= 2) {
        is_before = try_seek(index_.keys[key]) && current_ <= target;
    }
    if (!is_before) {
        if (Status opened = open(); !opened.ok()) return opened;
        if (Status read = read_packet(); !read.ok()) return read;
    }
    while (!at_end_ && current_ < target) {
        if (Status read = read_packet(); !read.ok()) return read;
    }
    return watch_.status();
}

bool FrameReader::try_seek(int32_t key) {
    ++counts_.seeks;
    const IndexedPacket& packet = index_.packets[key];
    const bool by_byte = (demuxer_->is_format("mpegts") || demuxer_->is_format("mpeg")) && packet.byte_position >= 0;
    const bool by_dts = demuxer_->is_format("mov") && packet.dts != IndexedPacket::kNone;
    at_end_ = false;
    expected_ = -1;
    if (!demuxer_->seek(by_byte ? packet.byte_position : by_dts ? packet.dts : packet.pts, by_byte)) return false;
    for (int strangers = 0; strangers < kMaxStrangers; ++strangers) {
        if (!read_packet().ok() || at_end_) return false;
        if (current_ >= 0) return true;
    }
    return false;
}

}  // namespace video
