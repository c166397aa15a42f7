// From packets to pictures. Other engines than the processor take this interface's place.
#pragma once

#include <functional>
#include <memory>

#include "ffmpeg.h"
#include "watch.h"

namespace video {

class Decoder {
public:
    // A frame's pts is the pts of the packet it came from.
    using Take = std::function<Status(const AVFrame&)>;

    virtual ~Decoder() = default;

    // Hands `packet` in (null: no more) and every frame that is ready to `take`. False: the packet is damaged.
    virtual bool decode(const AVPacket* packet, const Take& take, Status* status) = 0;
    // Forgets everything, ready for a packet from elsewhere.
    virtual void reset() = 0;
};

using OpenDecoder = std::function<Status(const AVStream*, const Limits&, std::unique_ptr<Decoder>*)>;

// FFmpeg's software decoder, on the calling thread only: files run in parallel, not frames.
Status open_software_decoder(const AVStream* stream, const Limits& limits, std::unique_ptr<Decoder>* decoder);

}  // namespace video
