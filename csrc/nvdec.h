// One GPU's hardware video decoders: what they can decode, and those that are open already.
#pragma once

#include <sys/types.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ffmpeg.h"
#include "nvdec_engine.h"

namespace video {

class Nvdec {
public:
    // Uses the primary context of the CUDA device `ordinal`, which is also that of every other library.
    static Status open(int ordinal, const std::string& libcuda, const std::string& libnvcuvid,
                       std::unique_ptr<Nvdec>* nvdec);
    ~Nvdec();
    Nvdec(const Nvdec&) = delete;

    const NvdecDriver& driver() const { return driver_; }
    // False in a process forked from the one that opened it: the driver does not survive a fork.
    bool is_usable() const;

    // Not ok, with the reason, where the GPU does not decode such a stream.
    Status check(AVCodecID codec, int bit_depth, int width, int height);
    // Decoders in hardware that can work at the same time on the most common kind of stream; 0 where there is none.
    int num_engines();

    // A decoder for the use of one thread, one that has decoded `codec` before if there is one; a call whose threads are
    // `limit` leaves no more than that open. Give it back; one in which something failed is closed.
    std::unique_ptr<NvdecEngine> borrow(cudaVideoCodec codec, int limit);
    void give_back(std::unique_ptr<NvdecEngine> engine, bool has_failed);

    // Makes the GPU the calling thread's while it lives.
    class Current {
    public:
        explicit Current(const Nvdec& nvdec);
        ~Current();
        const Status& status() const { return status_; }

    private:
        const Nvdec& nvdec_;
        Status status_;
    };

private:
    Nvdec() = default;

    Status caps(cudaVideoCodec codec, int bit_depth, CUVIDDECODECAPS* caps);

    NvdecDriver driver_;
    pid_t process_ = 0;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    std::mutex mutex_;
    std::map<std::pair<cudaVideoCodec, int>, CUVIDDECODECAPS> caps_;
    int num_open_ = 0;
    std::vector<std::unique_ptr<NvdecEngine>> idle_;
};

// The driver's name of a codec, cudaVideoCodec_NumCodecs for one that is left to the processor.
cudaVideoCodec nvdec_codec(AVCodecID codec);

}  // namespace video
