// Dropout for CPUs; fastln_kernels.reference.dropout defines it.

#include "dispatch.h"
#include "dropout.h"
#include "int8.h"
#include "parallel.h"

using namespace fastln;

// y = x with dropout applied. The rows of x are `x_stride` elements apart; each row is contiguous. y is contiguous.
// `rounding` rounds the rows of y to 8 bits too, if it is not null.
extern "C" void fastln_dropout(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* x,
                               int64_t x_stride, int64_t threshold, const int64_t* seed, void* y,
                               const Rounding* rounding) {
  if (n_rows == 0 || n_cols == 0) return;
  const Dropout dropout(threshold, seed);
  const int64_t rows = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1), n_blocks = (n_rows + rows - 1) / rows;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for_blocks(n_blocks, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
      for (int64_t row = block * rows; row < std::min(block * rows + rows, n_rows); row++) {
        const T* from = static_cast<const T*>(x) + row * x_stride;
        T* to = static_cast<T*>(y) + row * n_cols;
        const uint16_t* numbers = dropout.active() ? dropout.draw(row, n_cols, 0) : nullptr;
        for_columns(n_cols, [&](int64_t column, auto lanes) {
          const Float value = load(from + column, lanes);
          store(to + column, numbers ? dropout.apply(value, numbers + column) : value, lanes);
        });
        if (rounding) (*rounding)(row, to);
      }
    });
  });
}
