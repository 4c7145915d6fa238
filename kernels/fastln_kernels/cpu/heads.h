// Tensors of heads, and their rounding to 8 bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "int8.h"

namespace fastln {

// A tensor (batch, head, row, column) whose columns are contiguous; strides count elements.
struct Rows {
  void* data;
  int64_t batch, head, row;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t r) const {
    return static_cast<T*>(data) + b * batch + h * head + r * row;
  }
};

// Rounds the rows of a tensor whose heads lie side by side: a linear layer reads all heads of a token as one row. The
// thread that is the last to write to a block of rows rounds them, as long as they are in the cache.
class HeadRounding {
 public:
  // `rounding` may be null: nothing is rounded then. Blocks of `block` rows are finished by `writers` calls.
  HeadRounding(const Rounding* rounding, const Rows& rows, int64_t batches, int64_t n_rows, int64_t block,
               int64_t writers)
      : rounding_(rounding), rows_(rows), n_rows_(n_rows), block_(block), writers_(writers),
        n_blocks_((n_rows + block - 1) / block), written_(rounding ? batches * n_blocks_ : 0) {}

  // Says that the caller has written its columns of the block of rows that starts at `first`.
  template <class T>
  void wrote(int64_t batch, int64_t first) {
    if (!rounding_) return;
    // Every writer's stores come before the last writer's loads.
    if (written_[batch * n_blocks_ + first / block_].fetch_add(1, std::memory_order_acq_rel) + 1 < writers_) return;
    for (int64_t row = first; row < std::min(first + block_, n_rows_); row++)
      (*rounding_)(batch * n_rows_ + row, rows_.at<const T>(batch, 0, row));
  }

 private:
  const Rounding* rounding_;
  const Rows& rows_;
  const int64_t n_rows_, block_, writers_, n_blocks_;
  std::vector<std::atomic<int64_t>> written_;
};

}  // namespace fastln
