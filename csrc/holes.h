// Data that is missing from a file where its demuxer passes over the hole in silence, or suspects one where none is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "watch.h"

namespace video {

struct Hole {
    int64_t position = 0;      // byte of the file
    bool cuts_packet = true;   // what begins before it may lack its end, not only what follows its beginning
};

struct FileHoles {
    std::vector<Hole> holes;  // ascending
    bool ends_in_packet = false;
    bool lacks_bytes = false;  // the header promises more than there are
    bool is_encrypted = false;
    int64_t other_file_at = -1;  // where one is joined to the first whose streams need other decoders; -1: nowhere
};

// The elements of a Matroska file follow one another without a gap.
FileHoles find_matroska_holes(const std::string& path, const Watch& watch);

// The packets of one stream of an MPEG transport stream are numbered; `packet_bytes` is 188, 192 or 204.
FileHoles find_transport_holes(const std::string& path, int packet_bytes, int pid, const Watch& watch);

}  // namespace video
