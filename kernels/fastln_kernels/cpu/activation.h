// What the kernels of activations have in common: the functions themselves, and the loop over rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "functions.h"
#include "parallel.h"

namespace fastln {

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

}  // namespace fastln
