// Lost pictures of an H.264 stream, told by the numbers that the others carry.
#pragma once

#include <cstddef>
#include <vector>

namespace video {

// What the first slice of a picture says; frames only.
struct PictureOrder {
    bool is_known = false;
    bool is_idr = false;
    bool is_reference = false;
    bool allows_gaps = false;
    int frame_number = 0;
    int frame_number_range = 16;
    int count = -1;  // pic_order_cnt_lsb; -1: not sent
    int count_range = 16;
};

// Whether `next`, decoded right after `picture`, is shown before it; false where the counts do not tell.
bool is_shown_before(const PictureOrder& next, const PictureOrder& picture);

// Packets, ascending, that come after a lost one in decoding or in presentation. `pictures` are in decoding order.
std::vector<size_t> find_losses(const std::vector<PictureOrder>& pictures);

}  // namespace video
