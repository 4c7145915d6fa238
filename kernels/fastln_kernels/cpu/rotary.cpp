// Rotary positions for CPUs, and their gradient; fastln_kernels.reference_rotary defines them.

#include "dispatch.h"
#include "heads.h"
#include "parallel.h"

using namespace fastln;

// Same layout as native_rotary._Arguments. `cos` and `sin` are rows of `dim` columns, one per token; those of sequences
// are `cos_batch` elements apart, 0 if all sequences share them. `rounding` may be null.
struct RotaryArguments {
  int64_t dtype, n_threads, batches, heads, tokens, dim, backward, cos_batch;
  const void *cos, *sin;
  Rows x, y;
  const Rounding* rounding;  // where the rows of y, which hold all heads of a token, are written in 8 bits too
};

namespace {

// One head of one token. Columns i and i + half turn together.
template <bool BACKWARD, class T>
void turn_head(const T* x, const T* cos, const T* sin, int64_t half, T* y) {
  for_columns(half, [&](int64_t i, auto lanes) {
    const Float low = load(x + i, lanes), high = load(x + half + i, lanes);
    const Float low_sin = load(sin + i, lanes), high_sin = load(sin + half + i, lanes);
    const Float low_cos = load(cos + i, lanes), high_cos = load(cos + half + i, lanes);
    store(y + i, BACKWARD ? low * low_cos + high * high_sin : low * low_cos - high * low_sin, lanes);
    store(y + half + i, BACKWARD ? high * high_cos - low * low_sin : high * high_cos + low * high_sin, lanes);
  });
}

template <bool BACKWARD, class T>
void turn_tokens(const RotaryArguments& a) {
  const int64_t n_rows = a.batches * a.tokens, n_cols = a.heads * a.dim;
  const int64_t rows = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1), n_blocks = (n_rows + rows - 1) / rows;
  for_blocks(n_blocks, useful_threads(a.n_threads, n_rows * n_cols), [&](int64_t block) {
    for (int64_t row = block * rows; row < std::min(block * rows + rows, n_rows); row++) {
      const int64_t batch = row / a.tokens, token = row % a.tokens, at = batch * a.cos_batch + token * a.dim;
      const T *cos = static_cast<const T*>(a.cos) + at, *sin = static_cast<const T*>(a.sin) + at;
      for (int64_t head = 0; head < a.heads; head++)
        turn_head<BACKWARD>(a.x.at<const T>(batch, head, token), cos, sin, a.dim / 2, a.y.at<T>(batch, head, token));
      if (a.rounding) (*a.rounding)(row, a.y.at<const T>(batch, 0, token));
    }
  });
}

}  // namespace

extern "C" void fastln_rotary(const RotaryArguments* arguments) {
  const RotaryArguments& a = *arguments;
  with_dtype(a.dtype, [&](auto type) {
    with_constant(a.backward, [&](auto backward) { turn_tokens<backward.value, decltype(type)>(a); });
  });
}
