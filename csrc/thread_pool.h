// The threads that share one kernel's work. Knows nothing of kernels.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tern {

// A pool of `size` threads, the caller's among them. `run` gives every piece 0..pieces-1 to some thread, by calls of
// work(thread, piece), and returns when all are done; not `shared`, the caller does all of them. Calls from several
// threads take turns.
//
// A waiting thread spins for a moment, then yields, then sleeps: between the kernels of one step it is awake, and an idle
// pool takes nothing from others.
class ThreadPool {
  public:
    explicit ThreadPool(int size);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return int(threads_.size()) + 1; }
    void run(std::int64_t pieces, const std::function<void(int thread, std::int64_t piece)>& work, bool shared = true);

  private:
    void serve(int thread);
    void take_pieces(int thread);

    std::vector<std::thread> threads_;
    std::mutex callers_;

    const std::function<void(int, std::int64_t)>* work_ = nullptr;
    std::int64_t pieces_ = 0;
    alignas(64) std::atomic<std::int64_t> next_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<std::uint64_t> round_{0};  // each run is one

    std::mutex sleep_;
    std::condition_variable wake_;
    bool ending_ = false;
};

}  // namespace tern
