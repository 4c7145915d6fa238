// Runs blocks of work on threads, without a second OpenMP runtime: it calls the entry point of the runtime that torch
// has loaded. If no loaded library has this entry point, the calling thread does all the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
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

}  // namespace fastln
