// Parts of pictures that a decoder leaves as they were: slices that are missing, where it does not say so itself.
#pragma once

#include "ffmpeg.h"

namespace video {

// Has the buffers of a decoder that is not open yet marked; false for codecs where whole pictures may keep marks.
bool mark_buffers(AVCodecContext* context);

// Whether part of a picture in such a buffer was never written.
bool has_unwritten_part(const AVFrame& frame);

}  // namespace video
