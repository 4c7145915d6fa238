// Products of the rows of one tensor with the rows of another, for attention: q k^T and do v^T, block by block. A class
// holds both operands in the layouts that products need, either in a float type or as whole numbers in 8 bits.
#pragma once

#include <cmath>
#include <limits>

#include "int8.h"
#include "parallel.h"
#include "products.h"

namespace fastln {

// b where one is NaN.
inline Float maximum(Float a, Float b) {
#if defined(FASTLN_AVX512)
  return bits_as<Float>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#else
  return select(a > b, a, b);
#endif
}

inline float largest(Float values) {
#if defined(FASTLN_AVX512)
  return _mm512_reduce_max_ps(bits_as<__m512>(values));
#else
  float result = values[0];
  for (int lane = 1; lane < LANES; lane++) result = std::max(result, values[lane]);
  return result;
#endif
}

struct LeftProducts {
  float with_row, with_mean;
};

// In C: float or bfloat16. Rows are padded to `width` columns, a multiple of 2 PAD; a block of right rows has
// `block_rows`, a multiple of PAD.
template <class T, class C>
class Dots {
 public:
  void resize(int64_t n_left, int64_t n_right, int64_t block_rows, int64_t n_cols, int64_t width) {
    left_ = left_buffer_.at_least(n_left * width);
    right_ = right_buffer_.at_least(n_right * width);
    block_rows_ = block_rows, n_cols_ = n_cols, width_ = width;
  }

  // Takes note of all right rows before `put_right`.
  void centre(const T*, int64_t, int64_t) {}

  void put_left(const T* rows, int64_t stride, int64_t n_rows, int64_t at) {
    copy_rows(rows, stride, n_rows, n_cols_, left_ + at * width_, width_);
  }

  // `at` is the first row of a block.
  void put_right(const T* rows, int64_t stride, int64_t n_rows, int64_t at) {
    C* to = right_ + at * width_;
    if constexpr (PAIRED<C>) {
      C* copy = copy_buffer_.at_least(block_rows_ * width_);
      copy_rows(rows, stride, n_rows, n_cols_, copy, width_);
      transpose_to_pairs(copy, n_rows, width_, to, block_rows_);
    } else {
      transpose_rows(rows, stride, n_rows, n_cols_, width_, copy_buffer_.at_least(PAD * width_), to, block_rows_);
    }
  }

  // Lays right rows out as a second operand (n_rows, width) of other products.
  template <class To>
  void pair_right(const T* rows, int64_t stride, int64_t n_rows, To* to) const {
    pair_rows(rows, stride, n_rows, n_cols_, to, width_);
  }

  // Writes the products of left rows with right rows from the first of a block, (n_left, block_rows).
  void multiply(int64_t n_left, int64_t n_right, int64_t left, int64_t right, float* to) const {
    fastln::multiply(n_left, n_right, width_, left_ + left * width_, width_, right_ + right * width_, block_rows_, to,
                     block_rows_, false);
  }

  // The factor of a left row.
  float factor(int64_t) const { return 1; }

  // Reads what `multiply` wrote for a left row and the right rows from `right` on, and multiplies by `factor`, the
  // row's times the scale. It is a copy, which compilers know that no store changes.
  struct Values {
    Float operator()(const float* product, int64_t column, float factor) const {
      return load(product + column, AllLanes{}) * factor;
    }
  };
  Values values(int64_t) const { return {}; }

  // The product of a left row with any row, and with what all right rows were moved by.
  LeftProducts products_with(int64_t left, const T* row) const {
    Sum sum;
    sum_columns(n_cols_, [&](int64_t column, auto lanes, int part) {
      sum.parts[part] += load(left_ + left * width_ + column, lanes) * load(row + column, lanes);
    });
    return {sum.total(), 0};
  }

 private:
  Buffer<C> left_buffer_, right_buffer_, copy_buffer_;
  C *left_, *right_;
  int64_t block_rows_, n_cols_, width_;
};

// In 8 bits, with a scale per row (int8.h). The mean of all right rows is taken off each.
// fastln_kernels.reference_attention defines the rest.
template <class T>
class Dots<T, int8_t> {
 public:
  void resize(int64_t n_left, int64_t n_right, int64_t block_rows, int64_t n_cols, int64_t width) {
    left_ = left_buffer_.at_least(n_left * width);
    right_ = right_buffer_.at_least(n_right * width);
    left_scale_ = left_scale_buffer_.at_least(n_left);
    right_scale_ = right_scale_buffer_.at_least(n_right);
    excess_ = excess_buffer_.at_least(n_right);
    mean_ = mean_buffer_.at_least(width);
    row_ = row_buffer_.at_least(width);
    block_rows_ = block_rows, n_cols_ = n_cols, width_ = width;
  }

  // A column that holds NaN or Inf has the mean 0.
  void centre(const T* rows, int64_t stride, int64_t n_rows) {
    double* sums = sum_buffer_.at_least(width_);
    std::fill_n(sums, width_, 0.0);
    for (int64_t row = 0; row < n_rows; row++, rows += stride) {
      prefetch_row(rows + AHEAD * stride, n_cols_);
      for_columns(n_cols_, [&](int64_t column, auto lanes) {
        Doubles sum;
        std::memcpy(&sum, sums + column, sizeof(sum));
        sum += __builtin_convertvector(load(rows + column, lanes), Doubles);
        std::memcpy(sums + column, &sum, sizeof(sum));
      });
    }
    for (int64_t column = 0; column < width_; column++) {
      const float mean = static_cast<float>(sums[column] / static_cast<double>(n_rows));
      mean_[column] = std::isfinite(mean) ? mean : 0;
    }
  }

  void put_left(const T* rows, int64_t stride, int64_t n_rows, int64_t at) {
    for (int64_t row = at; row < at + n_rows; row++, rows += stride) {
      prefetch_row(rows + AHEAD * stride, n_cols_);
      left_scale_[row] = quantise_row(rows, nullptr, false, n_cols_, width_, row_, left_ + row * width_);
    }
    std::memset(left_ + (at + n_rows) * width_, ZERO, (padded(n_rows) - n_rows) * width_);
  }

  void put_right(const T* rows, int64_t stride, int64_t n_rows, int64_t at) {
    int8_t* copy = copy_buffer_.at_least(block_rows_ * width_);
    std::memset(copy + n_rows * width_, 0, (padded(n_rows) - n_rows) * width_);
    std::fill_n(right_scale_ + at, padded(n_rows), 0.0f);
    std::fill_n(excess_ + at, padded(n_rows), 0);
    for (int64_t row = 0; row < n_rows; row++) {
      prefetch_row(rows + (row + AHEAD) * stride, n_cols_);
      move(rows + row * stride, row_);
      const Scale scale(largest(row_, n_cols_));
      right_scale_[at + row] = scale.scale;
      // What is added to left rows, times the sum of the right one.
      excess_[at + row] = static_cast<int32_t>(ZERO) * store_signed_row(scale.inverse, copy + row * width_);
    }
    // Four neighbouring numbers of a row are one word.
    transpose_words(reinterpret_cast<const uint32_t*>(copy), width_ / 4, padded(n_rows), width_ / 4,
                    reinterpret_cast<uint32_t*>(right_ + at * width_), block_rows_);
  }

  template <class To>
  void pair_right(const T* rows, int64_t stride, int64_t n_rows, To* to) {
    float* moved = moved_buffer_.at_least(block_rows_ * width_);
    for (int64_t row = 0; row < n_rows; row++) move(rows + row * stride, moved + row * width_);
    pair_rows(moved, width_, n_rows, n_cols_, to, width_);
  }

  void multiply(int64_t n_left, int64_t n_right, int64_t left, int64_t right, float* to) const {
    products.int8(n_left, n_right, width_, width_, block_rows_, block_rows_, false, left_ + left * width_,
                  right_ + right * width_, reinterpret_cast<int32_t*>(to), true);
  }

  float factor(int64_t left) const { return left_scale_[left]; }

  struct Values {
    const int32_t* excesses;
    const float* scales;

    Float operator()(const float* product, int64_t column, float factor) const {
      Int sum, excess;
      std::memcpy(&sum, product + column, sizeof(sum));
      std::memcpy(&excess, excesses + column, sizeof(excess));
      return __builtin_convertvector(sum - excess, Float) * load(scales + column, AllLanes{}) * factor;
    }
  };
  Values values(int64_t right) const { return {excess_ + right, right_scale_ + right}; }

  LeftProducts products_with(int64_t left, const T* row) const {
    Sum sum, moved;
    sum_columns(n_cols_, [&](int64_t column, auto lanes, int part) {
      const Float x = signed_numbers(left_ + left * width_ + column);
      sum.parts[part] += x * load(row + column, lanes);
      moved.parts[part] += x * load(mean_ + column, lanes);
    });
    return {sum.total() * left_scale_[left], moved.total() * left_scale_[left]};
  }

 private:
  using Bytes = uint8_t __attribute__((vector_size(LANES)));
  using Doubles = double __attribute__((vector_size(2 * FASTLN_VECTOR_BYTES)));

  // The numbers that `quantise_row` stored.
  static Float signed_numbers(const uint8_t* from) {
#if defined(FASTLN_AVX512)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bits_as<Float>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))) - static_cast<float>(ZERO);
#else
    Float values{};
    for (int lane = 0; lane < LANES; lane++) values[lane] = static_cast<float>(from[lane] - ZERO);
    return values;
#endif
  }

  // Rounds the numbers in `row_`, with their signs; returns the sum.
  int32_t store_signed_row(float inverse, int8_t* to) const {
    if (inverse == 0) {
      std::memset(to, 0, width_);
      return 0;
    }
    int32_t sum = 0;
    for (int64_t column = 0; column < width_; column += TURNED) {
      Float block[VECTORS];
      if (column + TURNED <= n_cols_) {
        load_block(row_ + column, block);
        sum += store_signed(block, inverse, to + column);
      } else {
        int8_t whole[TURNED];
        load_block(row_ + column, block, n_cols_ - column);
        sum += store_signed(block, inverse, whole);
        std::memcpy(to + column, whole, std::min(TURNED, width_ - column));
      }
    }
    return sum;
  }

  // Takes the mean off a right row.
  void move(const T* row, float* to) const {
    for_columns(n_cols_, [&](int64_t column, auto lanes) {
      store(to + column, load(row + column, lanes) - load(mean_ + column, lanes), lanes);
    });
  }

  Buffer<uint8_t> left_buffer_;
  Buffer<int8_t> right_buffer_, copy_buffer_;
  Buffer<float> left_scale_buffer_, right_scale_buffer_, mean_buffer_, row_buffer_, moved_buffer_;
  Buffer<int32_t> excess_buffer_;
  Buffer<double> sum_buffer_;
  uint8_t* left_;
  int8_t* right_;
  float *left_scale_, *right_scale_, *mean_, *row_;
  int32_t* excess_;  // what the ZERO added to left rows adds to a product
  int64_t block_rows_, n_cols_, width_;
};

}  // namespace fastln
