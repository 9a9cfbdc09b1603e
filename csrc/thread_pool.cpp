#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tern {

namespace {

constexpr int kSpins = 4000;   // about 100 microseconds on x86: longer than the pause between two kernels
constexpr int kYields = 200;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Wait until done() for a while; false if it takes longer than that.
template <class Done>
bool wait_awake(const Done& done) {
    for (int i = 0; i < kSpins; ++i) {
        if (done()) return true;
        pause();
    }
    for (int i = 0; i < kYields; ++i) {
        if (done()) return true;
        std::this_thread::yield();
    }
    return done();
}

}  // namespace

ThreadPool::ThreadPool(int size) {
    threads_.reserve(size > 1 ? size - 1 : 0);
    for (int thread = 1; thread < size; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(sleep_);
        ending_ = true;
        round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(std::int64_t pieces, const std::function<void(int, std::int64_t)>& work, bool shared) {
    std::lock_guard caller(callers_);
    if (threads_.empty() || pieces <= 1 || !shared) {
        for (std::int64_t piece = 0; piece < pieces; ++piece) work(0, piece);
        return;
    }
    work_ = &work;
    pieces_ = pieces;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(int(threads_.size()), std::memory_order_relaxed);
    {
        std::lock_guard lock(sleep_);
        round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_pieces(0);
    while (!wait_awake([&] { return busy_.load(std::memory_order_acquire) == 0; })) {
    }
}

void ThreadPool::take_pieces(int thread) {
    for (;;) {
        const std::int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
        if (piece >= pieces_) return;
        (*work_)(thread, piece);
    }
}

void ThreadPool::serve(int thread) {
    std::uint64_t seen = 0;
    for (;;) {
        const auto begun = [&] { return round_.load(std::memory_order_acquire) != seen; };
        if (!wait_awake(begun)) {
            std::unique_lock lock(sleep_);
            wake_.wait(lock, begun);
        }
        ++seen;
        if (ending_) return;
        take_pieces(thread);
        busy_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace tern
