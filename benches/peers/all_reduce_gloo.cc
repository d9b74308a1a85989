// Gloo's ring all-reduce over TCP on loopback (it has no other transport for one machine): f32 sum in place, measured as
// `annulus bench` does it. It starts its own ranks.
//
// usage: all_reduce_gloo FOLDER RANKS SECONDS BYTES...      FOLDER is empty; the ranks meet in it
// Rank 0 prints one line a size: bytes, median of the slowest rank's time in us, iterations, wrong elements.
#include <gloo/allreduce.h>
#include <gloo/barrier.h>
#include <gloo/math.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/tcp/device.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <vector>

namespace {

constexpr int kTrialCalls = 8, kFewest = 10, kMost = 10000;

using Clock = std::chrono::steady_clock;
using Reduce = void (*)(void*, const void*, const void*, size_t);

class Ranks {
public:
    Ranks(const char* folder, int rank, int ranks) : context_(std::make_shared<gloo::rendezvous::Context>(rank, ranks)) {
        gloo::transport::tcp::attr loopback;
        loopback.iface = "lo";
        auto device = gloo::transport::tcp::CreateDevice(loopback);
        gloo::rendezvous::FileStore store(folder);
        context_->connectFullMesh(store, device);
    }

    template <typename T>
    void all_reduce(std::vector<T>& data, Reduce reduce) {
        gloo::AllreduceOptions options(context_);
        options.setOutput(data.data(), data.size());
        options.setReduceFunction(reduce);
        options.setAlgorithm(gloo::AllreduceOptions::Algorithm::RING);
        options.setTag(tag_++);
        gloo::allreduce(options);
    }

    void barrier() {
        gloo::BarrierOptions options(context_);
        options.setTag(tag_++);
        gloo::barrier(options);
    }

    // The slowest rank's seconds, call by call, in order of size; the same on every rank.
    std::vector<double> run(std::vector<float>& data, int calls) {
        std::vector<double> seconds;
        for (int i = 0; i < calls; i++) {
            barrier();
            auto start = Clock::now();
            all_reduce(data, &gloo::sum<float>);
            seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
        }
        if (calls > 0) all_reduce(seconds, &gloo::max<double>);
        std::sort(seconds.begin(), seconds.end());
        return seconds;
    }

private:
    std::shared_ptr<gloo::rendezvous::Context> context_;
    uint32_t tag_ = 0;
};

// Small integers, so that every order of summation is exact.
float input(int rank, size_t index) { return static_cast<float>((index * 31 + static_cast<size_t>(rank) * 7) % 257); }

double wrong_elements(Ranks& all, std::vector<float>& data, int rank, int ranks) {
    for (size_t i = 0; i < data.size(); i++) data[i] = input(rank, i);
    all.all_reduce(data, &gloo::sum<float>);
    std::vector<double> wrong(1, 0.0);
    for (size_t i = 0; i < data.size(); i++) {
        float expected = 0;
        for (int r = 0; r < ranks; r++) expected += input(r, i);
        wrong[0] += data[i] != expected;
    }
    all.all_reduce(wrong, &gloo::sum<double>);
    return wrong[0];
}

void be_rank(const char* folder, int rank, int ranks, double budget, int sizes, char** arguments) {
    Ranks all(folder, rank, ranks);
    for (int argument = 0; argument < sizes; argument++) {
        size_t bytes = std::strtoull(arguments[argument], nullptr, 10);
        std::vector<float> data(bytes / sizeof(float));
        double wrong = wrong_elements(all, data, rank, ranks);
        std::fill(data.begin(), data.end(), 0.0f); // sums of zeroes stay what they are
        double estimate = std::max(all.run(data, kTrialCalls)[kTrialCalls / 2], 1e-9);
        all.run(data, static_cast<int>(std::min<double>(0.1 * budget / estimate, kMost)));
        int calls = static_cast<int>(std::min<double>(std::max<double>(budget / estimate, kFewest), kMost));
        auto seconds = all.run(data, calls);
        if (rank == 0) std::printf("%zu %.3f %d %.0f\n", bytes, seconds[calls / 2] * 1e6, calls, wrong);
        std::fflush(stdout);
    }
    all.barrier();
}

}  // namespace

int main(int argc, char** argv) {
    int ranks = argc > 4 ? std::atoi(argv[2]) : 0;
    if (ranks < 1) {
        std::fprintf(stderr, "usage: all_reduce_gloo FOLDER RANKS SECONDS BYTES...\n");
        return 2;
    }
    int rank = 0;
    for (int other = 1; other < ranks && rank == 0; other++) {
        pid_t child = fork();
        if (child < 0) return 1;
        if (child == 0) rank = other;
    }
    try {
        be_rank(argv[1], rank, ranks, std::atof(argv[3]), argc - 4, argv + 4);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "all_reduce_gloo: rank %d: %s\n", rank, error.what());
        _exit(1);
    }
    if (rank != 0) _exit(0);
    bool failed = false;
    for (int status; wait(&status) > 0;) failed |= status != 0;
    return failed;
}
