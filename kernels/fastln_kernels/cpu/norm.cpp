// LayerNorm and RMSNorm for CPUs, forward and backward, each one pass over memory: a row is read once and stays in the
// first cache until it is done. What they compute is defined by fastln_kernels.reference; the formulas are derived in
// kernels/README.md. Sums over rows are taken per block of rows and then over the blocks in order, so that the result
// depends on the shape alone, not on the threads.

#include <algorithm>
#include <cmath>

#include "dropout.h"
#include "parallel.h"
#include "vector.h"

namespace fastln {
namespace {

constexpr int64_t ELEMENTS_A_BLOCK = 1 << 14;  // of the work that a thread takes at a time
constexpr int64_t SUMMED_ROWS = 32;            // whose sums are one partial sum, at least
constexpr int64_t MAX_PARTIALS = 1 << 20;      // floats of one kind of partial sum, at most

// The dtypes of fastln_kernels.cpu.library.DTYPES, in its order.
enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

template <class Function>
void with_dtype(int64_t dtype, Function&& function) {
  switch (dtype) {
    case FLOAT32: return function(float{});
    case BFLOAT16: return function(bfloat16{});
    case FLOAT16: return function(float16{});
  }
}

template <class T>
T* at(T* rows, int64_t row, int64_t stride) {
  return rows ? rows + row * stride : nullptr;
}

// A parameter in float32, plus `offset`; `absent` where there is none.
void widen_parameter(const void* parameter, int64_t dtype, float offset, float absent, int64_t n_cols, float* to) {
  if (!parameter) {
    std::fill_n(to, n_cols, absent);
    return;
  }
  with_dtype(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(parameter);
    for_columns(n_cols, [&](int64_t column, auto lanes, int) {
      store(to + column, load(from + column, lanes) + offset, lanes);
    });
  });
}

// A number near the mean of most rows: the mean of the first columns.
template <class S>
float near_mean(const S* values, int64_t n_cols) {
  Sum first;
  const int64_t n_first = std::min<int64_t>(n_cols, UNROLL * LANES);
  for_columns(n_first, [&](int64_t column, auto lanes, int part) { first.parts[part] += load(values + column, lanes); });
  return first.total() / n_first;
}

// Whether sums of differences from a number are too inexact, for it is more than two deviations from the mean.
bool is_far(float residual, float variance) { return residual * residual > 4 * variance; }

// x_hat = ((x - near) - residual) * rstd
struct Moments {
  float near = 0;      // of the mean
  float residual = 0;  // what is left of it
  float variance = 0;  // plus eps
};

template <class S>
Moments moments_about(float near, const S* values, int64_t n_cols, float eps) {
  Sum differences, squares;
  for_columns(n_cols, [&](int64_t column, auto lanes, int part) {
    const Float difference = inside(load(values + column, lanes) - near, lanes);
    differences.parts[part] += difference;
    squares.parts[part] += difference * difference;
  });
  const float residual = differences.total() / n_cols;
  return {near, residual, squares.total() / n_cols - residual * residual + eps};
}

template <bool CENTRE, class S>
Moments moments(const S* values, int64_t n_cols, float eps) {
  if constexpr (CENTRE) {
    const Moments found = moments_about(near_mean(values, n_cols), values, n_cols, eps);
    if (!is_far(found.residual, found.variance)) return found;
    return moments_about(found.near + found.residual, values, n_cols, eps);
  } else {
    Sum squares;
    for_columns(n_cols, [&](int64_t column, auto lanes, int part) {
      const Float value = load(values + column, lanes);
      squares.parts[part] += value * value;
    });
    return {0, 0, squares.total() / n_cols + eps};
  }
}

template <class T>
struct Forward {
  const T *x, *residual;
  int64_t x_stride, residual_stride, n_cols;
  const float *scale, *shift;
  float eps;
  bool round_normed;
  Dropout dropout;
  T *y, *stream, *normed;
  float* rstd;

  template <bool CENTRE>
  void run(int64_t row) const {
    const T* values = at(x, row, x_stride);
    if (!residual && !dropout.active()) {
      finish<CENTRE>(row, values);
      if (stream) std::copy_n(values, n_cols, at(stream, row, n_cols));
      return;
    }
    thread_local Buffer<float> buffer;
    float* sums = buffer.at_least(n_cols);
    add_up(row, sums);
    finish<CENTRE>(row, sums);
  }

  // Writes `residual + dropout(x)`.
  void add_up(int64_t row, float* to) const {
    const T *values = at(x, row, x_stride), *others = at(residual, row, residual_stride);
    T* kept = at(stream, row, n_cols);
    const uint16_t* numbers = nullptr;
    if (dropout.active()) numbers = dropout.draw(row, n_cols);
    for_columns(n_cols, [&](int64_t column, auto lanes, int) {
      Float value = load(values + column, lanes);
      if (numbers) value = dropout.apply(value, numbers + column);
      if (others) value += load(others + column, lanes);
      if (kept) {
        value = rounded(value, T{});
        store(kept + column, value, lanes);
      }
      store(to + column, value, lanes);
    });
  }

  template <bool CENTRE, class S>
  void finish(int64_t row, const S* values) const {
    const Moments found = moments<CENTRE>(values, n_cols, eps);
    const float factor = 1 / std::sqrt(found.variance), shifted = -found.residual * factor;
    rstd[row] = factor;
    T *out = at(y, row, n_cols), *kept = at(normed, row, n_cols);
    for_columns(n_cols, [&](int64_t column, auto lanes, int) {
      Float x_hat = load(values + column, lanes);
      x_hat = CENTRE ? (x_hat - found.near) * factor + shifted : x_hat * factor;
      if (kept) store(kept + column, x_hat, lanes);
      if (round_normed) x_hat = rounded(x_hat, T{});
      store(out + column, x_hat * load(scale + column, lanes) + load(shift + column, lanes), lanes);
    });
  }
};

template <class T>
struct Backward {
  const T *dy, *saved, *dstream;
  int64_t dy_stride, saved_stride, dstream_stride, n_cols;
  const float *rstd, *scale;
  bool centre, saved_is_normed, round_normed;
  Dropout dropout;
  T *dx, *dresidual;

  // Means along a row: of saved - near, of g and of g * (saved - near), where g = dy * scale.
  struct RowSums {
    float near = 0, residual = 0, gradient = 0, product = 0;
  };

  template <bool INPUT>
  RowSums row_sums(float near, const T* dy, const T* saved) const {
    Sum differences, gradients, products;
    for_columns(n_cols, [&](int64_t column, auto lanes, int part) {
      const Float difference = inside(load(saved + column, lanes) - near, lanes);
      differences.parts[part] += difference;
      if constexpr (INPUT) {
        const Float gradient = load(dy + column, lanes) * load(scale + column, lanes);
        gradients.parts[part] += gradient;
        products.parts[part] += gradient * difference;
      }
    });
    RowSums means{near, differences.total() / n_cols};
    if constexpr (INPUT) means.gradient = gradients.total() / n_cols, means.product = products.total() / n_cols;
    return means;
  }

  // The row's gradients, and its part of the sums over rows.
  template <bool INPUT, bool DWEIGHT, bool DBIAS>
  void run(int64_t row, float* dweight, float* dbias) const {
    const T* dy = at(this->dy, row, dy_stride);
    const T* saved = at(this->saved, row, saved_stride);
    RowSums sums;
    float factor = 1;  // x_hat = ((saved - near) - residual) * factor
    if constexpr (INPUT || DWEIGHT) {
      if (!saved_is_normed) factor = rstd[row];
      const bool find_mean = centre && !saved_is_normed;
      if (find_mean) {
        sums = row_sums<INPUT>(near_mean(saved, n_cols), dy, saved);
        if (is_far(sums.residual, 1 / (factor * factor))) sums = row_sums<INPUT>(sums.near + sums.residual, dy, saved);
      } else if (INPUT) {
        sums = row_sums<INPUT>(0, dy, saved);
        sums.residual = 0;
      }
    }
    const float shifted = -sums.residual * factor, mean_g = centre ? sums.gradient : 0;
    const float mean_g_x_hat = factor * (sums.product - sums.residual * sums.gradient);
    T *dx = at(this->dx, row, n_cols), *dresidual = at(this->dresidual, row, n_cols);
    const T* dstream = at(this->dstream, row, dstream_stride);
    const float out_factor = INPUT ? rstd[row] : 0;
    const uint16_t* numbers = nullptr;
    if (INPUT && dx && dropout.active()) numbers = dropout.draw(row, n_cols);
    for_columns(n_cols, [&](int64_t column, auto lanes, int) {
      const Float gradient = load(dy + column, lanes);
      if constexpr (DBIAS) store(dbias + column, load(dbias + column, lanes) + gradient, lanes);
      if constexpr (INPUT || DWEIGHT) {
        const Float x_hat = (load(saved + column, lanes) - sums.near) * factor + shifted;
        if constexpr (DWEIGHT) {
          const Float multiplied = round_normed ? rounded(x_hat, T{}) : x_hat;
          store(dweight + column, load(dweight + column, lanes) + gradient * multiplied, lanes);
        }
        if constexpr (INPUT) {
          Float inner = (gradient * load(scale + column, lanes) - mean_g - x_hat * mean_g_x_hat) * out_factor;
          if (dstream) inner += load(dstream + column, lanes);
          if (dresidual) store(dresidual + column, inner, lanes);
          if (dx) store(dx + column, numbers ? dropout.apply(inner, numbers + column) : inner, lanes);
        }
      }
    });
  }
};

// Adds up `n_partials` rows of partial sums, in order, into a gradient of any dtype.
void add_partials(const float* partials, int64_t n_partials, int64_t n_cols, void* gradient, int64_t dtype) {
  with_dtype(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(gradient);
    for_columns(n_cols, [&](int64_t column, auto lanes, int) {
      Float total{};
      for (int64_t partial = 0; partial < n_partials; partial++) total += load(partials + partial * n_cols + column, lanes);
      store(to + column, total, lanes);
    });
  });
}

int useful_threads(int64_t n_threads, int64_t n_elements) {
  return static_cast<int>(std::clamp<int64_t>(n_elements / ELEMENTS_A_BLOCK, 1, n_threads));
}

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

// The arguments are those of fastln_kernels.reference.norm_forward; rows are contiguous along the columns, `threshold`
// is reference.dropout_threshold(dropout), and a null pointer stands for None and for what is not wanted.
void fastln_norm_forward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* x,
                         int64_t x_stride, const void* residual, int64_t residual_stride, const void* weight,
                         int64_t weight_dtype, const void* bias, int64_t bias_dtype, double eps, bool centre,
                         double offset, bool round_normed, int64_t threshold, const int64_t* seed, void* y,
                         void* stream, void* normed, float* rstd) {
  thread_local Buffer<float> buffer;
  float* scale = buffer.at_least(2 * n_cols);
  float* shift = scale + n_cols;
  widen_parameter(weight, weight_dtype, static_cast<float>(offset), 1, n_cols, scale);
  widen_parameter(bias, bias_dtype, 0, 0, n_cols, shift);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Forward<T> forward{static_cast<const T*>(x), static_cast<const T*>(residual), x_stride, residual_stride,
                             n_cols, scale, shift, static_cast<float>(eps), round_normed, Dropout(threshold, seed),
                             static_cast<T*>(y), static_cast<T*>(stream), static_cast<T*>(normed), rstd};
    const int64_t rows_a_block = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1);
    const int64_t n_blocks = (n_rows + rows_a_block - 1) / rows_a_block;
    for_blocks(n_blocks, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
      const int64_t end = std::min((block + 1) * rows_a_block, n_rows);
      for (int64_t row = block * rows_a_block; row < end; row++)
        centre ? forward.template run<true>(row) : forward.template run<false>(row);
    });
  });
}

// Likewise, of fastln_kernels.reference.norm_backward.
void fastln_norm_backward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* dy,
                          int64_t dy_stride, const void* saved, int64_t saved_stride, const void* dstream,
                          int64_t dstream_stride, const void* weight, int64_t weight_dtype, const float* rstd,
                          bool centre, double offset, bool round_normed, bool saved_is_normed, int64_t threshold,
                          const int64_t* seed, void* dx, void* dresidual, void* dweight, void* dbias,
                          int64_t grad_dtype) {
  thread_local Buffer<float> scale_buffer, partial_buffer;
  float* scale = scale_buffer.at_least(n_cols);
  widen_parameter(weight, weight_dtype, static_cast<float>(offset), 1, n_cols, scale);

  int64_t rows_a_block = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1);
  if (dweight || dbias) {
    const int64_t max_blocks = std::clamp<int64_t>(MAX_PARTIALS / n_cols, 16, 256);
    rows_a_block = std::max(SUMMED_ROWS, (n_rows + max_blocks - 1) / max_blocks);
  }
  const int64_t n_blocks = (n_rows + rows_a_block - 1) / rows_a_block;
  const int64_t partial_size = n_blocks * n_cols;
  float* partials = partial_buffer.at_least(partial_size * ((dweight != nullptr) + (dbias != nullptr)));
  float* dweights = partials;
  float* dbiases = dweight ? partials + partial_size : partials;

  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Backward<T> backward{static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<const T*>(dstream),
                               dy_stride, saved_stride, dstream_stride, n_cols, rstd, scale, centre, saved_is_normed,
                               round_normed, Dropout(threshold, seed), static_cast<T*>(dx), static_cast<T*>(dresidual)};
    const auto run = [&](auto input, auto has_dweight, auto has_dbias) {
      for_blocks(n_blocks, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
        float *dweight_sums = dweights + block * n_cols, *dbias_sums = dbiases + block * n_cols;
        if (has_dweight) std::fill_n(dweight_sums, n_cols, 0.0f);
        if (has_dbias) std::fill_n(dbias_sums, n_cols, 0.0f);
        const int64_t end = std::min((block + 1) * rows_a_block, n_rows);
        for (int64_t row = block * rows_a_block; row < end; row++)
          backward.template run<input, has_dweight, has_dbias>(row, dweight_sums, dbias_sums);
      });
    };
    const auto choose = [](bool value, auto&& next) { value ? next(std::true_type{}) : next(std::false_type{}); };
    choose(dx || dresidual, [&](auto input) {
      choose(dweight, [&](auto has_dweight) { choose(dbias, [&](auto has_dbias) { run(input, has_dweight, has_dbias); }); });
    });
  });
  if (dweight) add_partials(dweights, n_blocks, n_cols, dweight, grad_dtype);
  if (dbias) add_partials(dbiases, n_blocks, n_cols, dbias, grad_dtype);
}

}  // extern "C"
