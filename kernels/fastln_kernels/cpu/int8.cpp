// Frozen linear layers in 8 bits, for CPUs: y = x Wᵀ + bias and dx = dy W, from one copy of the weight;
// fastln_kernels.reference_int8 defines them. A thread packs a block of the weight in its cache, in the layout that the
// processor's products need, and multiplies rows by it, chunk after chunk. Sums are whole numbers, so their order does
// not matter.

#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "int8.h"
#include "parallel.h"
#include "products.h"

namespace fastln {
namespace {

constexpr int64_t COLS = 64;  // columns of the result per product: a block that is turned, too
constexpr int64_t ROWS = 64;  // rows per product: their sums, too, fit into the L1 cache
constexpr int64_t INNER = 1536;  // most inner columns per product
constexpr int64_t BLOCK_BYTES = 512 << 10;  // bytes of weight packed at once, in the L2 cache
constexpr int64_t LARGE = 2 << 20;  // bytes of a result that the L2 cache does not hold
static_assert(COLS == TURNED);

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

// Same layout as native_int8._Quantise. `factors` may be null.
struct Quantise {
  int64_t dtype, n_threads, n_rows, n_cols, n_padded, turned, x_stride;
  const void* x;
  const float* factors;
  uint8_t* values;
  float* scale;
  uint8_t* rest_values;  // of what the rounding leaves over, if that is rounded too; then there are factors
  float* rest_scale;
};

// Same layout as native_int8._Product. `weight` is (n_weight_rows, n_weight_cols); `backward` sums over its rows instead
// of its columns. `sums` are the weight's, over what is summed. `col_scale` and `bias` may be null.
struct Product8Arguments {
  int64_t dtype, n_threads, n_rows, n_padded, n_weight_rows, n_weight_cols, backward, turned, bias_dtype;
  const uint8_t* rows;
  const float* row_scale;
  const int8_t* weight;
  const int32_t* sums;
  const float* col_scale;
  const void* bias;
  const float* addend;  // (n_rows, n_weight_rows), of the forward product, or null
  void* y;
};

namespace {

// Interleaves four rows of 64 columns.
inline void interleave(const int8_t* from, int64_t stride, int8_t* to) {
#if defined(FASTLN_AVX512)
  __m512i row[4], pair[4], quad[4];
  for (int i = 0; i < 4; i++) row[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 2; i++) {
    pair[2 * i] = _mm512_unpacklo_epi8(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm512_unpackhi_epi8(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    quad[2 * i] = _mm512_unpacklo_epi16(pair[i], pair[2 + i]);
    quad[2 * i + 1] = _mm512_unpackhi_epi16(pair[i], pair[2 + i]);
  }
  // Each of the four holds four columns out of every sixteen: transpose 4 x 4 groups of 16 bytes.
  const __m512i a = _mm512_shuffle_i32x4(quad[0], quad[1], 0x88), b = _mm512_shuffle_i32x4(quad[0], quad[1], 0xDD);
  const __m512i c = _mm512_shuffle_i32x4(quad[2], quad[3], 0x88), d = _mm512_shuffle_i32x4(quad[2], quad[3], 0xDD);
  _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, c, 0x88));
  _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(b, d, 0x88));
  _mm512_storeu_si512(to + 128, _mm512_shuffle_i32x4(a, c, 0xDD));
  _mm512_storeu_si512(to + 192, _mm512_shuffle_i32x4(b, d, 0xDD));
#else
  for (int64_t column = 0; column < COLS; column++)
    for (int i = 0; i < 4; i++) to[4 * column + i] = from[i * stride + column];
#endif
}

template <class T>
class Multiply {
 public:
  explicit Multiply(const Product8Arguments& arguments) : a_(arguments) {}

  void run() const {
    const int64_t all = blocks(n_cols_, COLS), row_blocks = blocks(a_.n_rows, ROWS), threads = a_.n_threads;
    // Each thread gets panels of its own, as far as there are enough. Then no two threads pack the same.
    const int64_t most = std::clamp<int64_t>(std::min(BLOCK_BYTES / (a_.n_padded * COLS), all / threads), 1, all);
    const int64_t least = blocks(all, most);
    // Several items a thread, so that who ends early can take over: chunks of rows, or fewer panels if rows are few.
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    const int64_t chunks = std::clamp<int64_t>(blocks(wanted, least), 1, std::max<int64_t>(row_blocks / 2, 1));
    const int64_t parts = std::clamp(blocks(wanted, chunks), least, all);
    for_ranges(chunks * parts, static_cast<int>(threads), [&] {
      return [&, packed = int64_t{-1}](int64_t item) mutable {
        const int64_t chunk = item % chunks, part = item / chunks;
        const int64_t row = chunk * row_blocks / chunks * ROWS, last = (chunk + 1) * row_blocks / chunks * ROWS;
        const int64_t col = part * all / parts * COLS, last_col = (part + 1) * all / parts * COLS;
        block_of(row, std::min(last, a_.n_rows) - row, col, std::min(last_col, n_cols_) - col, packed != part);
        packed = part;
      };
    });
  }

 private:
  // Multiplies rows by a block of the weight. If not `pack`, the thread's buffer holds it.
  void block_of(int64_t first_row, int64_t n_rows, int64_t first_col, int64_t n_cols, bool pack) const {
    thread_local Buffer<int8_t> operand_buffer;
    thread_local Buffer<int32_t> sum_buffer;
    thread_local Buffer<float> bias_buffer;
    int8_t* operand = operand_buffer.at_least(blocks(n_cols, COLS) * COLS * a_.n_padded);
    int32_t* sums = sum_buffer.at_least(ROWS * COLS);
    float* bias = bias_buffer.at_least(blocks(n_cols, COLS) * COLS);
    for (int64_t col = 0; col < (pack ? n_cols : 0); col += COLS)
      lay_out(first_col + col, std::min(COLS, n_cols - col), operand + col * a_.n_padded);
    if (a_.bias) {
      with_dtype(a_.bias_dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(a_.bias) + first_col;
        for_columns(n_cols, [&](int64_t column, auto lanes) { store(bias + column, load(from + column, lanes), lanes); });
      });
    }
    for (int64_t done = 0; done < n_rows; done += ROWS) {
      const int64_t row = first_row + done, count = std::min(ROWS, n_rows - done);
      for (int64_t col = 0; col < n_cols; col += COLS) {
        const int64_t width = std::min(COLS, n_cols - col);
        if (large_)  // stores would wait for each cache line
          for (int64_t r = row; r < row + count; r++)
            prefetch_row<T, true>(static_cast<const T*>(a_.y) + r * n_cols_ + first_col + col, width);
        for (int64_t inner = 0; inner < a_.n_padded; inner += most_inner_) {
          products.int8(padded(count), padded(width), std::min(most_inner_, a_.n_padded - inner), a_.n_padded, COLS, COLS,
                        inner > 0, a_.rows + row * a_.n_padded + inner, operand + (col * a_.n_padded + inner * COLS), sums,
                        true);
        }
        finish(sums, row, count, first_col + col, width, a_.bias ? bias + col : nullptr);
      }
    }
    products.release(true);
  }

  // Writes the second operand (n_padded, COLS) of the result's columns from `col` on.
  void lay_out(int64_t col, int64_t width, int8_t* to) const {
    const int64_t stride = a_.n_weight_cols;
    int64_t done = 0;
    if (width == COLS && a_.backward) {
      constexpr int64_t AHEAD = 32;  // rows are too far apart for the processor's own prefetchers
      for (; done + 4 <= n_inner_; done += 4) {
        const int8_t* from = a_.weight + done * stride + col;
        for (int i = 0; i < 4; i++) __builtin_prefetch(from + (AHEAD + i) * stride);
        interleave(from, stride, to + done * COLS);
      }
    } else if (width == COLS && stride % 4 == 0) {
      done = n_inner_;
      transpose_words<true>(reinterpret_cast<const uint32_t*>(a_.weight + col * stride), stride / 4, COLS, n_inner_ / 4,
                          reinterpret_cast<uint32_t*>(to), COLS);
    }
    std::memset(to + done * COLS, 0, (a_.n_padded - done) * COLS);
    const int64_t by_inner = a_.backward ? stride : 1, by_col = a_.backward ? 1 : stride;
    for (; done < n_inner_; done++)
      for (int64_t c = 0; c < width; c++)
        to[(done / 4 * COLS + c) * 4 + done % 4] = a_.weight[done * by_inner + (col + c) * by_col];
  }

  // Turns whole numbers into the result. Their rows stored 128 too much.
  void finish(const int32_t* sums, int64_t row, int64_t n_rows, int64_t col, int64_t width, const float* bias) const {
    const auto run = [&](auto form) {
      if (width == COLS)
        finish<form>(sums, row, n_rows, col, bias, [](int) { return AllLanes{}; });
      else
        finish<form>(sums, row, n_rows, col, bias, [&](int i) {
          return SomeLanes{static_cast<int>(std::clamp<int64_t>(width - i * LANES, 0, LANES))};
        });
    };
    if (a_.turned) return run(std::integral_constant<Form, TURNED_BACK>{});
    if (!a_.col_scale) return run(std::integral_constant<Form, PLAIN>{});
    if (!bias) return run(std::integral_constant<Form, SCALED>{});
    run(std::integral_constant<Form, SHIFTED>{});
  }

  enum Form { PLAIN, TURNED_BACK, SCALED, SHIFTED };

  // A block's numbers stay in registers, so every loop over its vectors is unrolled.
  template <Form FORM, class LanesOf>
  void finish(const int32_t* sums, int64_t row, int64_t n_rows, int64_t col, const float* bias,
              const LanesOf& lanes_of) const {
    T* y = static_cast<T*>(a_.y) + row * n_cols_ + col;
    const float* addend = FORM >= SCALED && a_.addend ? a_.addend + row * n_cols_ + col : nullptr;
    Int excess[VECTORS];
    Float scale[VECTORS], shift[VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) {
      const auto lanes = lanes_of(i);
      excess[i] = bits_as<Int>(load(reinterpret_cast<const float*>(a_.sums + col) + i * LANES, lanes)) * 128;
      if (FORM >= SCALED) scale[i] = load(a_.col_scale + col + i * LANES, lanes);
      if (FORM == SHIFTED) shift[i] = load(bias + i * LANES, lanes);
    }
    for (int64_t r = 0; r < n_rows; r++, sums += COLS, y += n_cols_) {
      const float row_scale = a_.row_scale[row + r];
      Float values[VECTORS];
#pragma GCC unroll 16
      for (int i = 0; i < VECTORS; i++) {
        Int whole;
        std::memcpy(&whole, sums + i * LANES, sizeof(whole));
        values[i] = __builtin_convertvector(whole - excess[i], Float) * row_scale;
        if (FORM >= SCALED) values[i] *= scale[i];
        if (FORM == SHIFTED) values[i] += shift[i];
        if (addend) values[i] += load(addend + r * n_cols_ + i * LANES, lanes_of(i));
      }
      if (FORM == TURNED_BACK) turn(values);
#pragma GCC unroll 16
      for (int i = 0; i < VECTORS; i++) store(y + i * LANES, values[i], lanes_of(i));
    }
  }

  const Product8Arguments& a_;
  const int64_t n_cols_ = a_.backward ? a_.n_weight_cols : a_.n_weight_rows;
  const bool large_ = a_.n_rows * n_cols_ * static_cast<int64_t>(sizeof(T)) > LARGE;
  // Equal parts of a row, whole cache lines each.
  const int64_t most_inner_ = blocks(a_.n_padded / COLS, blocks(a_.n_padded, INNER)) * COLS;
  const int64_t n_inner_ = a_.backward ? a_.n_weight_rows : a_.n_weight_cols;
};

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

void fastln_quantise(const Quantise* arguments) {
  const Quantise& a = *arguments;
  const int64_t rows = std::max<int64_t>(ELEMENTS_A_BLOCK / a.n_padded, 1);
  const int threads = useful_threads(a.n_threads, a.n_rows * a.n_padded);
  with_dtype(a.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(a.x);
    for_blocks((a.n_rows + rows - 1) / rows, threads, [&](int64_t block) {
      thread_local Buffer<float> buffer;
      float* work = buffer.at_least(a.n_padded);
      for (int64_t row = block * rows; row < std::min((block + 1) * rows, a.n_rows); row++) {
        uint8_t* values = a.values + row * a.n_padded;
        a.scale[row] = quantise_row(x + row * a.x_stride, a.factors, a.turned, a.n_cols, a.n_padded, work, values);
        if (!a.rest_values) continue;
        a.rest_scale[row] = quantise_rest(work, values, a.scale[row], a.n_padded, a.rest_values + row * a.n_padded);
      }
    });
  });
}

void fastln_int8_product(const Product8Arguments* arguments) {
  with_dtype(arguments->dtype, [&](auto type) { Multiply<decltype(type)>(*arguments).run(); });
}

}  // extern "C"
