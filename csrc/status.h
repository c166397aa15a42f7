// Outcome of work on one video; the C++ side never throws across a thread or library boundary.
#pragma once

#include <string>
#include <utility>

namespace video {

enum class Code {
    kOk,
    kNotFound,
    kOpenFailed,
    kNoVideoStream,
    kDecodeFailed,
    kUnsupported,
    kLimitExceeded,
    kDeadline,
    kCancelled,
};

inline const char* name(Code code) {
    switch (code) {
        case Code::kOk: return "OK";
        case Code::kNotFound: return "NOT_FOUND";
        case Code::kOpenFailed: return "OPEN_FAILED";
        case Code::kNoVideoStream: return "NO_VIDEO_STREAM";
        case Code::kDecodeFailed: return "DECODE_FAILED";
        case Code::kUnsupported: return "UNSUPPORTED";
        case Code::kLimitExceeded: return "LIMIT_EXCEEDED";
        case Code::kDeadline: return "DEADLINE";
        case Code::kCancelled: return "CANCELLED";
    }
    return "UNKNOWN";
}

struct [[nodiscard]] Status {
    Code code = Code::kOk;
    std::string message;

    Status() = default;
    Status(Code code, std::string message) : code(code), message(std::move(message)) {}
    bool ok() const { return code == Code::kOk; }
};

inline Status out_of_memory() { return {Code::kDecodeFailed, "out of memory"}; }

}  // namespace video
