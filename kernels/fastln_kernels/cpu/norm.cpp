// LayerNorm and RMSNorm for CPUs, forward and backward. Each makes one pass over memory: a row is read once and stays
// in the L1 cache until it is finished. fastln_kernels.reference defines them; kernels/README.md derives the formulas.
// Sums over rows are taken per block of rows and then over the blocks in order, so the result depends on the shape and
// not on the number of threads.

#include <algorithm>
#include <cmath>

#include "codes.h"
#include "dispatch.h"
#include "dropout.h"
#include "int8.h"
#include "parallel.h"
#include "vector.h"

namespace fastln {
namespace {

constexpr int64_t SUMMED_ROWS = 32;            // minimum number of rows in one partial sum
constexpr int64_t MAX_PARTIALS = 1 << 20;      // maximum number of floats in one kind of partial sum
constexpr int64_t PIECE = 2048;                // maximum number of columns summed in float32
constexpr int GROUP = 4;            // rows processed together, so that no row waits for the end of another's sums
constexpr int64_t GROUP_BYTES = 24 << 10;  // maximum size of such a group, so that it stays in the L1 cache

template <class T>
T* at(T* rows, int64_t row, int64_t stride) {
  return rows ? rows + row * stride : nullptr;
}

// Writes a parameter in float32, plus `offset`; or `absent` if there is no parameter.
void widen_parameter(const void* parameter, int64_t dtype, float offset, float absent, int64_t n_cols, float* to) {
  if (!parameter) {
    std::fill_n(to, n_cols, absent);
    return;
  }
  with_dtype(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(parameter);
    for_columns(n_cols, [&](int64_t column, auto lanes) {
      store(to + column, load(from + column, lanes) + offset, lanes);
    });
  });
}

// A number that is near the mean for most rows: the mean of the first columns.
template <class S>
float near_mean(const S* values, int64_t n_cols) {
  Sum first;
  const int64_t n_first = std::min<int64_t>(n_cols, PARTS * LANES);
  sum_columns(n_first, [&](int64_t column, auto lanes, int part) { first.parts[part] += load(values + column, lanes); });
  return first.total() / n_first;
}

// Whether sums of differences from a number are too inexact: it is more than two standard deviations from the mean.
bool is_far(float residual, float variance) { return residual * residual > 4 * variance; }

// x_hat = ((x - near) - residual) * rstd
struct Moments {
  float near;      // a number near the mean
  float residual;  // mean - near
  float variance;  // variance + eps
};

// How many groups of columns a row has, each with a scale of its codes of x_hat.
constexpr int64_t n_groups(int64_t n_cols) { return (n_cols + COLUMNS_A_GROUP<8> - 1) / COLUMNS_A_GROUP<8>; }

// Loads what is saved of a row: its numbers, or what their codes stand for. A vector lies in one group.
template <class Saved, class Lanes>
inline Float load_saved(const Saved* saved, const float* scales, int64_t column, Lanes lanes) {
  static_assert(COLUMNS_A_GROUP<8> % LANES == 0);
  const Float value = load(saved + column, lanes);
  if constexpr (std::is_same_v<Saved, int8_t>) return value * scales[column / COLUMNS_A_GROUP<8>];
  return value;
}

// Calls `body(first, size)` for pieces of a row. Float32 sums over more columns would lose digits.
template <class Body>
void for_pieces(int64_t n_cols, Body&& body) {
  for (int64_t first = 0; first < n_cols; first += PIECE) body(first, std::min(PIECE, n_cols - first));
}

template <bool CENTRE, class S>
Moments moments_about(float near, const S* values, int64_t n_cols, float eps) {
  double difference_total = 0, square_total = 0;
  for_pieces(n_cols, [&](int64_t first, int64_t size) {
    Sum differences, squares;
    sum_columns(size, [&](int64_t column, auto lanes, int part) {
      Float difference = load(values + first + column, lanes);
      if constexpr (CENTRE) {
        difference = inside(difference - near, lanes);
        differences.parts[part] += difference;
      }
      squares.parts[part] += difference * difference;
    });
    difference_total += differences.total();
    square_total += squares.total();
  });
  const double residual = difference_total / n_cols;
  return {near, static_cast<float>(residual), static_cast<float>(square_total / n_cols - residual * residual + eps)};
}

template <bool CENTRE, class S>
Moments moments(const S* values, int64_t n_cols, float eps) {
  if (!CENTRE) return moments_about<false>(0, values, n_cols, eps);
  const Moments found = moments_about<true>(near_mean(values, n_cols), values, n_cols, eps);
  if (!is_far(found.residual, found.variance)) return found;
  return moments_about<true>(found.near + found.residual, values, n_cols, eps);
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
  int8_t* codes;
  float *rstd, *code_scale;
  const Rounding* rounding;

  // Normalises `R` rows.
  template <int R, bool CENTRE>
  void run(int64_t first) const {
    if (residual || dropout.active()) {
      thread_local Buffer<float> buffer;
      float* sums = buffer.at_least(R * n_cols);
      for (int r = 0; r < R; r++) add_up(first + r, sums + r * n_cols);
      finish<R, CENTRE>(first, sums, n_cols);
    } else {
      finish<R, CENTRE>(first, at(x, first, x_stride), x_stride);
      for (int r = 0; r < R && stream; r++) std::copy_n(at(x, first + r, x_stride), n_cols, at(stream, first + r, n_cols));
    }
  }

  // Writes `residual + dropout(x)`.
  void add_up(int64_t row, float* to) const {
    const T *values = at(x, row, x_stride), *others = at(residual, row, residual_stride);
    T* kept = at(stream, row, n_cols);
    const uint16_t* numbers = nullptr;
    if (dropout.active()) numbers = dropout.draw(row, n_cols, 0);
    for_columns(n_cols, [&](int64_t column, auto lanes) {
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

  // Writes the codes of x_hat.
  template <class S>
  void encode(int64_t row, const S* values, float near, float factor, float shifted) const {
    static_assert(PIECE % COLUMNS_TOGETHER<8> == 0);
    float x_hat[PIECE];
    auto* to = reinterpret_cast<uint8_t*>(at(codes, row, n_cols));
    float* scales = at(code_scale, row, n_groups(n_cols));
    for_pieces(n_cols, [&](int64_t first, int64_t size) {
      for_columns(size, [&](int64_t column, auto lanes) {
        store(x_hat + column, (load(values + first + column, lanes) - near) * factor + shifted, lanes);
      });
      encode_groups<8>(x_hat, size, to + first, scales + n_groups(first));
    });
  }

  template <int R, bool CENTRE, class S>
  void finish(int64_t first, const S* values, int64_t stride) const {
    float near[R], factor[R], shifted[R];  // x_hat = (x - near) * factor + shifted
    for (int r = 0; r < R; r++) {
      const Moments found = moments<CENTRE>(values + r * stride, n_cols, eps);
      near[r] = found.near;
      factor[r] = rstd[first + r] = 1 / std::sqrt(found.variance);
      shifted[r] = -found.residual * factor[r];
    }
    T *out = at(y, first, n_cols), *kept = at(normed, first, n_cols);
    for_columns(n_cols, [&](int64_t column, auto lanes) {
      const Float scales = load(scale + column, lanes), shifts = load(shift + column, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        Float x_hat = load(values + r * stride + column, lanes);
        x_hat = CENTRE ? (x_hat - near[r]) * factor[r] + shifted[r] : x_hat * factor[r];
        if (kept) store(kept + r * n_cols + column, x_hat, lanes);
        if (round_normed) x_hat = rounded(x_hat, T{});
        store(out + r * n_cols + column, x_hat * scales + shifts, lanes);
      }
    });
    for (int r = 0; r < R && codes; r++) encode(first + r, values + r * stride, near[r], factor[r], shifted[r]);
    for (int r = 0; r < R && rounding; r++) (*rounding)(first + r, out + r * n_cols);
  }
};

// The input or x_hat is saved in T, or x_hat in codes.
template <class T, class Saved>
struct Backward {
  static constexpr bool CODES = std::is_same_v<Saved, int8_t>;

  const T* dy;
  const Saved* saved;
  const T* dstream;
  int64_t dy_stride, saved_stride, dstream_stride, n_cols;
  const float *rstd, *code_scale, *scale;
  bool centre, saved_is_normed, round_normed;
  Dropout dropout;
  T *dx, *dresidual;
  const Rounding* rounding;

  // Means along a row: of saved - near, of g and of g * (saved - near), where g = dy * scale. What codes stand for is saved.
  struct RowSums {
    float near = 0, residual = 0, gradient = 0, product = 0;
  };

  template <bool INPUT>
  RowSums row_sums(float near, const T* dy, const Saved* saved, const float* scales) const {
    double difference_total = 0, gradient_total = 0, product_total = 0;
    for_pieces(n_cols, [&](int64_t first, int64_t size) {
      Sum differences, gradients, products;
      sum_columns(size, [&](int64_t column, auto lanes, int part) {
        column += first;
        const Float difference = inside(load_saved(saved, scales, column, lanes) - near, lanes);
        differences.parts[part] += difference;
        if constexpr (INPUT) {
          const Float gradient = load(dy + column, lanes) * load(scale + column, lanes);
          gradients.parts[part] += gradient;
          products.parts[part] += gradient * difference;
        } else {
          __builtin_prefetch(dy + column);  // it is read next
        }
      });
      difference_total += differences.total();
      if constexpr (INPUT) gradient_total += gradients.total(), product_total += products.total();
    });
    const auto mean = [&](double total) { return static_cast<float>(total / n_cols); };
    return {near, mean(difference_total), mean(gradient_total), mean(product_total)};
  }

  // Computes the gradients of `R` rows and adds their part to the sums over rows.
  template <int R, bool INPUT, bool DWEIGHT>
  void run(int64_t first, float* dweight, float* dbias) const {
    const T* dy = at(this->dy, first, dy_stride);
    const Saved* saved = at(this->saved, first, saved_stride);
    const float* scales = at(code_scale, first, n_groups(n_cols));
    const T* dstream = at(this->dstream, first, dstream_stride);
    T *dx = at(this->dx, first, n_cols), *dresidual = at(this->dresidual, first, n_cols);
    // x_hat = (saved - near) * factor + shifted; inner = g * rstds + constant + x_hat * slope
    float near[R], factor[R], shifted[R], rstds[R], constant[R], slope[R];
    const uint16_t* numbers[R] = {};
    const bool drop = INPUT && dx && dropout.active();
    for (int r = 0; r < R && (INPUT || DWEIGHT); r++) {
      const T* row_dy = dy + r * dy_stride;
      const Saved* row_saved = saved + r * saved_stride;
      const float* row_scales = at(scales, r, n_groups(n_cols));
      rstds[r] = rstd[first + r];
      factor[r] = saved_is_normed ? 1 : rstds[r];
      RowSums sums;
      const bool needs_mean = !CODES && centre && !saved_is_normed;
      if constexpr (!CODES) {
        if (needs_mean) {
          sums = row_sums<INPUT>(near_mean(row_saved, n_cols), row_dy, row_saved, row_scales);
          if (is_far(sums.residual, 1 / (factor[r] * factor[r])))
            sums = row_sums<INPUT>(sums.near + sums.residual, row_dy, row_saved, row_scales);
        }
      }
      if (INPUT && !needs_mean) {
        sums = row_sums<INPUT>(0, row_dy, row_saved, row_scales);
        sums.residual = 0;
      }
      near[r] = sums.near;
      shifted[r] = -sums.residual * factor[r];
      if (!INPUT) continue;
      constant[r] = centre ? -sums.gradient * rstds[r] : 0;
      slope[r] = -factor[r] * (sums.product - sums.residual * sums.gradient) * rstds[r];
      if (drop) numbers[r] = dropout.draw(first + r, n_cols, r);
    }
    for_columns(n_cols, [&](int64_t column, auto lanes) {
      Float gains{}, dweights{}, dbiases{};
      if constexpr (INPUT) gains = load(scale + column, lanes);
      if constexpr (DWEIGHT) dweights = load(dweight + column, lanes);
      if (dbias) dbiases = load(dbias + column, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Float gradient = load(dy + r * dy_stride + column, lanes);
        dbiases += gradient;
        if constexpr (INPUT || DWEIGHT) {
          const Float value = load_saved(saved + r * saved_stride, at(scales, r, n_groups(n_cols)), column, lanes);
          const Float x_hat = CODES ? value : (value - near[r]) * factor[r] + shifted[r];
          if constexpr (DWEIGHT) dweights += gradient * (round_normed ? rounded(x_hat, T{}) : x_hat);
          if constexpr (INPUT) {
            Float inner = gradient * gains * rstds[r] + constant[r] + x_hat * slope[r];
            if (dstream) inner += load(dstream + r * dstream_stride + column, lanes);
            if (dresidual) store(dresidual + r * n_cols + column, inner, lanes);
            if (dx) store(dx + r * n_cols + column, drop ? dropout.apply(inner, numbers[r] + column) : inner, lanes);
          }
        }
      }
      if constexpr (DWEIGHT) store(dweight + column, dweights, lanes);
      if (dbias) store(dbias + column, dbiases, lanes);
    });
    for (int r = 0; r < R && rounding; r++) (*rounding)(first + r, dx + r * n_cols);
  }
};

// Adds `n_partials` rows of partial sums, in order, and writes the gradient in any dtype.
void add_partials(const float* partials, int64_t n_partials, int64_t n_cols, void* gradient, int64_t dtype) {
  with_dtype(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(gradient);
    for_columns(n_cols, [&](int64_t column, auto lanes) {
      Float total{};
      for (int64_t partial = 0; partial < n_partials; partial++) total += load(partials + partial * n_cols + column, lanes);
      store(to + column, total, lanes);
    });
  });
}

// Calls `run(row, R)` for all rows from `first` to `end` - 1: R rows starting at `row`, where R is a constant.
// `row_bytes` is the number of bytes read or written per row.
template <class Run>
void for_rows(int64_t first, int64_t end, int64_t row_bytes, Run&& run) {
  int64_t row = first;
  if (GROUP * row_bytes <= GROUP_BYTES)
    for (; row + GROUP <= end; row += GROUP) run(row, std::integral_constant<int, GROUP>{});
  for (; row < end; row++) run(row, std::integral_constant<int, 1>{});
}

// The number of pointers that are not null.
template <class... Pointers>
int64_t count(Pointers... pointers) {
  return (0 + ... + (pointers != nullptr));
}

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

// The arguments are those of fastln_kernels.reference.norm_forward. Each row is contiguous. `threshold` is
// reference.dropout_threshold(dropout). A null pointer means None, or a result that is not requested. `rounding` rounds the
// rows of y to 8 bits too, if it is not null. The scales of `codes` are `code_scale`.
void fastln_norm_forward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* x,
                         int64_t x_stride, const void* residual, int64_t residual_stride, const void* weight,
                         int64_t weight_dtype, const void* bias, int64_t bias_dtype, double eps, bool centre,
                         double offset, bool round_normed, int64_t threshold, const int64_t* seed, void* y,
                         void* stream, void* normed, int8_t* codes, float* rstd, float* code_scale,
                         const Rounding* rounding) {
  thread_local Buffer<float> buffer;
  float* scale = buffer.at_least(2 * n_cols);
  float* shift = scale + n_cols;
  widen_parameter(weight, weight_dtype, static_cast<float>(offset), 1, n_cols, scale);
  widen_parameter(bias, bias_dtype, 0, 0, n_cols, shift);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Forward<T> forward{static_cast<const T*>(x), static_cast<const T*>(residual), x_stride, residual_stride,
                             n_cols, scale, shift, static_cast<float>(eps), round_normed, Dropout(threshold, seed),
                             static_cast<T*>(y), static_cast<T*>(stream), static_cast<T*>(normed), codes, rstd,
                             code_scale, rounding};
    const int64_t row_bytes = n_cols * (sizeof(T) * count(x, residual, y, stream, normed) + count(codes));
    const int64_t rows_a_block = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1);
    const int64_t n_blocks = (n_rows + rows_a_block - 1) / rows_a_block;
    for_blocks(n_blocks, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
      const int64_t end = std::min((block + 1) * rows_a_block, n_rows);
      for_rows(block * rows_a_block, end, row_bytes, [&](int64_t row, auto rows) {
        centre ? forward.template run<rows, true>(row) : forward.template run<rows, false>(row);
      });
    });
  });
}

// The same for fastln_kernels.reference.norm_backward. `saved` holds codes if `code_scale` is not null. `rounding` rounds
// the rows of dx.
void fastln_norm_backward(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* dy,
                          int64_t dy_stride, const void* saved, int64_t saved_stride, const void* dstream,
                          int64_t dstream_stride, const void* weight, int64_t weight_dtype, const float* rstd,
                          const float* code_scale, bool centre, double offset, bool round_normed, bool saved_is_normed, int64_t threshold,
                          const int64_t* seed, void* dx, void* dresidual, void* dweight, void* dbias,
                          int64_t grad_dtype, const Rounding* rounding) {
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
    const auto with_saved = [&](auto saved_type) {
      using Saved = decltype(saved_type);
      const Backward<T, Saved> backward{
          static_cast<const T*>(dy), static_cast<const Saved*>(saved), static_cast<const T*>(dstream), dy_stride,
          saved_stride, dstream_stride, n_cols, rstd, code_scale, scale, centre, saved_is_normed, round_normed,
          Dropout(threshold, seed), static_cast<T*>(dx), static_cast<T*>(dresidual), rounding};
      const int64_t row_bytes = n_cols * (sizeof(T) * count(dy, dstream, dx, dresidual) + sizeof(Saved) * count(saved));
      with_constant(dx || dresidual, [&](auto input) {
        with_constant(dweight, [&](auto has_dweight) {
          for_blocks(n_blocks, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
            float* dweight_sums = dweight ? dweights + block * n_cols : nullptr;
            float* dbias_sums = dbias ? dbiases + block * n_cols : nullptr;
            if (dweight) std::fill_n(dweight_sums, n_cols, 0.0f);
            if (dbias) std::fill_n(dbias_sums, n_cols, 0.0f);
            const int64_t end = std::min((block + 1) * rows_a_block, n_rows);
            for_rows(block * rows_a_block, end, row_bytes, [&](int64_t row, auto rows) {
              backward.template run<rows, input, has_dweight>(row, dweight_sums, dbias_sums);
            });
          });
        });
      });
    };
    code_scale ? with_saved(int8_t{}) : with_saved(type);
  });
  if (dweight) add_partials(dweights, n_blocks, n_cols, dweight, grad_dtype);
  if (dbias) add_partials(dbiases, n_blocks, n_cols, dbias, grad_dtype);
}

// The same for fastln_kernels.reference.norm_again, from x_hat, in codes if `code_scale` is not null. `rounding` rounds the
// rows of y.
void fastln_norm_again(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, const void* saved,
                       int64_t saved_stride, const float* code_scale, const void* weight, int64_t weight_dtype,
                       const void* bias, int64_t bias_dtype, double offset, bool round_normed, void* y,
                       const Rounding* rounding) {
  thread_local Buffer<float> buffer;
  float* scale = buffer.at_least(2 * n_cols);
  float* shift = scale + n_cols;
  widen_parameter(weight, weight_dtype, static_cast<float>(offset), 1, n_cols, scale);
  widen_parameter(bias, bias_dtype, 0, 0, n_cols, shift);
  const int64_t rows_a_block = std::max<int64_t>(ELEMENTS_A_BLOCK / n_cols, 1);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_saved = [&](auto saved_type) {
      using Saved = decltype(saved_type);
      for_blocks((n_rows + rows_a_block - 1) / rows_a_block, useful_threads(n_threads, n_rows * n_cols), [&](int64_t block) {
        for (int64_t row = block * rows_a_block; row < std::min((block + 1) * rows_a_block, n_rows); row++) {
          const Saved* from = at(static_cast<const Saved*>(saved), row, saved_stride);
          T* to = at(static_cast<T*>(y), row, n_cols);
          const float* scales = at(code_scale, row, n_groups(n_cols));
          for_columns(n_cols, [&](int64_t column, auto lanes) {
            Float x_hat = load_saved(from, scales, column, lanes);
            if (round_normed) x_hat = rounded(x_hat, T{});
            store(to + column, x_hat * load(scale + column, lanes) + load(shift + column, lanes), lanes);
          });
          if (rounding) (*rounding)(row, to);
        }
      });
    };
    code_scale ? with_saved(int8_t{}) : with_saved(type);
  });
}

}  // extern "C"
