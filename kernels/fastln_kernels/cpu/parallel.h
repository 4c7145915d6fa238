// Runs blocks of work on threads, without a second OpenMP runtime: it calls the entry point of the runtime that torch
// has loaded. If no loaded library has this entry point, the calling thread does all the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

extern "C" __attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned n_threads,
                                                     unsigned flags);

namespace fastln {

// A buffer that a thread keeps between calls. It only grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* at_least(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, size_ * sizeof(T)));
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out each number from 0 to n_blocks - 1 once, to any thread that asks.
class Blocks {
 public:
  explicit Blocks(int64_t n_blocks) : n_blocks_(n_blocks) {}

  bool take(int64_t& block) {
    block = next_.fetch_add(1, std::memory_order_relaxed);
    return block < n_blocks_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t n_blocks_;
};

constexpr int64_t ELEMENTS_A_BLOCK = 1 << 14;  // the work that a thread takes at a time

// At most so many threads that each gets a block.
inline int useful_threads(int64_t n_threads, int64_t n_elements) {
  return static_cast<int>(std::clamp<int64_t>(n_elements / ELEMENTS_A_BLOCK, 1, n_threads));
}

// Hands out each number from 0 to n - 1 once. A thread takes the numbers of its own range from the front. When none are
// left, it takes the last one of another's range.
class Ranges {
 public:
  Ranges(const Ranges&) = delete;
  Ranges(int64_t n, int n_threads) : n_threads_(n_threads), ranges_(new Range[n_threads]) {
    for (int64_t i = 0; i < n_threads; i++) ranges_[i] = pack(i * n / n_threads, (i + 1) * n / n_threads);
  }

  // Returns a thread's number, below n_threads.
  int enter() { return entered_.fetch_add(1, std::memory_order_relaxed) % n_threads_; }

  bool take(int thread, int64_t& number) {
    if (take(ranges_[thread], true, number)) return true;
    for (int i = 1; i < n_threads_; i++)
      if (take(ranges_[(thread + i) % n_threads_], false, number)) return true;
    return false;
  }

 private:
  using Range = std::atomic<uint64_t>;  // first, and behind last: both change at once

  static uint64_t pack(uint64_t first, uint64_t end) { return first << 32 | end; }

  static bool take(Range& range, bool front, int64_t& number) {
    uint64_t old = range.load(std::memory_order_relaxed), first, end;
    do {
      first = old >> 32, end = old & 0xFFFFFFFF;
      if (first == end) return false;
      number = static_cast<int64_t>(front ? first : end - 1);
    } while (!range.compare_exchange_weak(old, front ? pack(first + 1, end) : pack(first, end - 1),
                                          std::memory_order_relaxed));
    return true;
  }

  const int n_threads_;
  std::atomic<int> entered_{0};
  std::unique_ptr<Range[]> ranges_;
};

// Calls `work(block)` for every block, on up to `n_threads` threads. A block's result must not depend on the thread.
template <class Work>
void for_blocks(int64_t n_blocks, int n_threads, const Work& work) {
  struct Shared {
    Blocks blocks;
    const Work& work;
  } shared{Blocks(n_blocks), work};
  const auto run = [](void* data) {
    auto& [blocks, work] = *static_cast<Shared*>(data);
    for (int64_t block; blocks.take(block);) work(block);
  };
  if (n_threads > n_blocks) n_threads = static_cast<int>(n_blocks);
  if (n_threads > 1 && GOMP_parallel)
    GOMP_parallel(run, &shared, n_threads, 0);
  else
    run(&shared);
}

// Like `for_blocks`, but a thread mostly gets neighbouring blocks, one after another, and calls its own `work`, which
// `make_work()` returns. So `work` can keep what it needs for the next block, too.
template <class MakeWork>
void for_ranges(int64_t n_blocks, int n_threads, const MakeWork& make_work) {
  n_threads = GOMP_parallel ? static_cast<int>(std::clamp<int64_t>(n_blocks, 1, n_threads)) : 1;
  struct Shared {
    Ranges ranges;
    const MakeWork& make_work;
  } shared{Ranges(n_blocks, n_threads), make_work};
  const auto run = [](void* data) {
    auto& [ranges, make_work] = *static_cast<Shared*>(data);
    auto work = make_work();
    const int thread = ranges.enter();
    for (int64_t block; ranges.take(thread, block);) work(block);
  };
  if (n_threads > 1)
    GOMP_parallel(run, &shared, n_threads, 0);
  else
    run(&shared);
}

}  // namespace fastln
