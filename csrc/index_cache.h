// Indexes kept on disk, so that a file is read through once and not once per epoch.
#pragma once

#include <memory>
#include <string>

#include "index.h"

namespace video {

// The kept index of the file at `path`, if the file has not changed since (size, time, path, versions); else null.
std::shared_ptr<const Index> load_index(const std::string& folder, const std::string& path);
// Keeps `index`; a folder that cannot be written to is not an error, the index is only read again next time.
void store_index(const std::string& folder, const Index& index);

}  // namespace video
