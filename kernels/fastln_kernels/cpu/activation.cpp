// Activations for CPUs, plain and gated, forward and backward; fastln_kernels.reference_activation defines them.

#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "functions.h"
#include "int8.h"
#include "parallel.h"

namespace fastln {
namespace {

// In the order of fastln_kernels.reference_activation.ACTIVATION_KINDS.
enum Kind : int64_t { GELU, GELU_TANH, QUICK_GELU, SILU, RELU };

constexpr float RSQRT_TWO_PI = 0.398942280f;
constexpr float QUICK_GELU_SLOPE = 1.702f;
constexpr float GELU_TANH_SLOPE = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float GELU_TANH_CUBIC = 0.044715f;

// The functions of a vector are part of the loops that call them: their constants stay in registers.
#define FASTLN_INLINE inline __attribute__((always_inline))

// z(x), where the activation is x logistic(z(x)).
template <Kind KIND>
FASTLN_INLINE Float argument(Float x) {
  if constexpr (KIND == GELU_TANH) return GELU_TANH_SLOPE * x * (1.0f + GELU_TANH_CUBIC * (x * x));
  return KIND == QUICK_GELU ? QUICK_GELU_SLOPE * x : x;
}

// For results in T.
template <Kind KIND, class T>
FASTLN_INLINE Float value(Float x, T type) {
  if constexpr (KIND == RELU) return select(x <= 0.0f, Float{}, x);  // keeps NaN
  if constexpr (KIND == GELU) return x * normal_share_for(x, bell_for(x, type), type);
  const Float e = exponential_for(-argument<KIND>(x), type);
  if constexpr (std::is_same_v<T, float>) return x / (1.0f + e);
  return x * inverse_for(1.0f + e, type);
}

struct ValueAndSlope {
  Float value, slope;
};

// The derivative of x s(z(x)), s the logistic function, is s + x s (1 - s) z'(x).
template <Kind KIND, class T>
FASTLN_INLINE ValueAndSlope value_and_slope(Float x, T type) {
  if constexpr (KIND == RELU) return {value<RELU>(x, type), select(x <= 0.0f, Float{}, broadcast(1.0f))};
  if constexpr (KIND == GELU) {
    const Float bell = bell_for(x, type), part = normal_share_for(x, bell, type);
    return {x * part, part + x * bell * RSQRT_TWO_PI};
  }
  const auto [part, rest] = logistic_for(argument<KIND>(x), type);
  const Float value = x * part;
  if constexpr (KIND == QUICK_GELU) return {value, part + value * rest * QUICK_GELU_SLOPE};
  if constexpr (KIND == SILU) return {value, part + value * rest};
  Float square = x * x;
  square = select(square > 1e30f, broadcast(1e30f), square);  // infinity times the 0 of `rest` would be NaN
  return {value, part + value * rest * (GELU_TANH_SLOPE * (1.0f + 3 * GELU_TANH_CUBIC * square))};
}

template <class Function>
void with_kind(int64_t kind, Function&& function) {
  switch (kind) {
    case GELU: return function(std::integral_constant<Kind, GELU>{});
    case GELU_TANH: return function(std::integral_constant<Kind, GELU_TANH>{});
    case QUICK_GELU: return function(std::integral_constant<Kind, QUICK_GELU>{});
    case SILU: return function(std::integral_constant<Kind, SILU>{});
    case RELU: return function(std::integral_constant<Kind, RELU>{});
  }
}

// Calls `work(row, first, size)` for pieces of rows, or for whole rows, over threads.
template <class Work>
void for_pieces(int64_t n_rows, int64_t n_cols, bool whole, int64_t n_threads, const Work& work) {
  if (n_cols == 0) return;
  const int64_t size = whole ? n_cols : std::min(n_cols, ELEMENTS_A_BLOCK), pieces = (n_cols + size - 1) / size;
  const int64_t rows = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1), row_blocks = (n_rows + rows - 1) / rows;
  for_blocks(row_blocks * pieces, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
    const int64_t first = block % pieces * size, row = block / pieces * rows;
    for (int64_t r = row; r < std::min(row + rows, n_rows); r++) work(r, first, std::min(size, n_cols - first));
  });
}

template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* at(int64_t row, int64_t column) const { return data ? data + row * stride + column : nullptr; }
};

template <class T>
Rows<T> rows(void* data, int64_t stride) {
  return {static_cast<T*>(data), stride};
}
template <class T>
Rows<const T> rows(const void* data, int64_t stride) {
  return {static_cast<const T*>(data), stride};
}

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

// y = activation(gate), or activation(gate) * up if `up` is not null. Each row is contiguous. `rounding` rounds the rows
// of y to 8 bits too, if it is not null.
void fastln_activation_forward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t kind,
                               const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                               int64_t y_stride, const Rounding* rounding) {
  with_dtype(dtype, [&](auto type) {
    with_kind(kind, [&](auto which) {
      using T = decltype(type);
      const auto gates = rows<T>(gate, gate_stride), ups = rows<T>(up, up_stride);
      const auto ys = rows<T>(y, y_stride);
      for_pieces(n_rows, n_cols, rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
        const T *gate = gates.at(row, first), *up = ups.at(row, first);
        T* y = ys.at(row, first);
        for_columns(size, [&](int64_t column, auto lanes) {
          Float result = value<which>(load(gate + column, lanes), T{});
          if (up) result *= load(up + column, lanes);
          store(y + column, result, lanes);
        });
        if (rounding) (*rounding)(row, y);
      });
    });
  });
}

// dgate = dy * activation'(gate), times up if `up` is not null. dup = dy * activation(gate). Results that are not
// requested are null. Roundings round the rows of dgate and dup to 8 bits too.
void fastln_activation_backward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t kind,
                                const void* dy, int64_t dy_stride, const void* gate, int64_t gate_stride,
                                const void* up, int64_t up_stride, void* dgate, int64_t dgate_stride, void* dup,
                                int64_t dup_stride, const Rounding* dgate_rounding, const Rounding* dup_rounding) {
  with_dtype(dtype, [&](auto type) {
    with_kind(kind, [&](auto which) {
      using T = decltype(type);
      const auto dys = rows<T>(dy, dy_stride), gates = rows<T>(gate, gate_stride), ups = rows<T>(up, up_stride);
      const auto dgates = rows<T>(dgate, dgate_stride), dups = rows<T>(dup, dup_stride);
      for_pieces(n_rows, n_cols, dgate_rounding || dup_rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
        const T *dy = dys.at(row, first), *gate = gates.at(row, first), *up = ups.at(row, first);
        T *dgate = dgates.at(row, first), *dup = dups.at(row, first);
        for_columns(size, [&](int64_t column, auto lanes) {
          const Float gradient = load(dy + column, lanes);
          const ValueAndSlope of = value_and_slope<which>(load(gate + column, lanes), T{});
          if (dgate) {
            const Float through = up ? gradient * load(up + column, lanes) : gradient;
            store(dgate + column, which == RELU ? select(of.slope == 0.0f, Float{}, through) : through * of.slope, lanes);
          }
          if (dup) store(dup + column, gradient * of.value, lanes);
        });
        if (dgate_rounding) (*dgate_rounding)(row, dgate);
        if (dup_rounding) (*dup_rounding)(row, dup);
      });
    });
  });
}

}  // extern "C"
