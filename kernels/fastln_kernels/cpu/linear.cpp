// The two products of a linear layer with a frozen weight, for CPUs: y = x Wᵀ + bias, and dx = dy W. The processor's
// matrix units need the weight in a packed layout. A library that receives the whole weight packs all of it, either at
// every call or once into a second copy. Here a thread packs one block of the weight in its cache and multiplies all
// rows by it, some rows at a time, before it packs the next block. This keeps no copy. Where float32 units are faster
// than bfloat16 units, packing also converts the weight, and rows are converted in the cache. Sums are float32 over a
// whole row, in a fixed order, so the result does not depend on the number of threads.

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"
#include "products.h"
#include "vector.h"

namespace fastln {
namespace {

constexpr int64_t COLS = 64;  // columns of the result per product
constexpr int64_t CHUNK = 4096;  // most rows per thread; if a row takes several products, its sums stay in memory

// How much is in the L2 cache at once.
struct Sizes {
  int64_t rows;  // rows per product
  int64_t inner_bytes;  // bytes of a row per product
  int64_t block_bytes;  // bytes of weight packed at once
};
constexpr Sizes AS_THEY_ARE{128, 6144, 384 << 10};
// Wider blocks of weight, so that rows are converted for fewer of them, beside fewer rows.
constexpr Sizes CONVERTED{64, 3072, 768 << 10};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

// Same layout as native_linear._Arguments. `bias` may be null.
struct Arguments {
  int64_t dtype, parameter_dtype, compute_dtype, n_threads, n_rows, n_inner, n_cols, transpose;
  const void *x, *weight, *bias;
  void* y;
  int64_t x_stride, weight_stride;
};

namespace {

// y (n_rows, n_cols) = x (n_rows, n_inner) times the weight's transpose, or times the weight itself. T is the type of
// the rows, W the type of weight and bias, C the type in which they are multiplied.
template <class T, class W, class C>
class Linear {
 public:
  explicit Linear(const Arguments& arguments) : a_(arguments) {}

  void run() const {
    const int64_t panels = std::clamp<int64_t>(SIZES.block_bytes / (inner() * COLS * sizeof(C)), 1, blocks(a_.n_cols, COLS));
    const int64_t cols = panels * COLS, col_blocks = blocks(a_.n_cols, cols);
    const int64_t wanted = a_.n_threads > 1 ? 3 * a_.n_threads : 1;
    const int64_t chunks = std::max(blocks(a_.n_rows, CHUNK),
                                    std::min(blocks(wanted, col_blocks), blocks(a_.n_rows, 2 * ROWS)));
    const int64_t chunk = blocks(blocks(a_.n_rows, chunks), ROWS) * ROWS, row_blocks = blocks(a_.n_rows, chunk);
    for_blocks(col_blocks * row_blocks, static_cast<int>(a_.n_threads), [&](int64_t block) {
      const int64_t row = block % row_blocks * chunk, col = block / row_blocks * cols;
      block_of(row, std::min(chunk, a_.n_rows - row), col, std::min(cols, a_.n_cols - col));
    });
  }

 private:
  static constexpr Sizes SIZES = std::is_same_v<T, C> ? AS_THEY_ARE : CONVERTED;
  static constexpr int64_t ROWS = SIZES.rows;

  // The most elements of a row that one product takes.
  int64_t inner() const {
    const int64_t inner_blocks = blocks(a_.n_inner * sizeof(C), SIZES.inner_bytes);
    return blocks(blocks(a_.n_inner, inner_blocks), 2 * PAD) * 2 * PAD;
  }

  // Packs blocks of the weight and multiplies each group of ROWS rows by all panels of a block.
  void block_of(int64_t first_row, int64_t n_rows, int64_t first_col, int64_t n_cols) const {
    thread_local Buffer<C> operand_buffer;
    thread_local Buffer<float> sum_buffer;
    const int64_t most = inner(), panels = blocks(n_cols, COLS);
    const bool whole = most >= a_.n_inner;
    C* operand = operand_buffer.at_least(panels * most * COLS);
    float* sums = sum_buffer.at_least((whole ? 1 : blocks(n_rows, ROWS) * panels) * ROWS * COLS);
    for (int64_t inner = 0; inner < a_.n_inner; inner += most) {
      const int64_t n_inner = std::min(most, a_.n_inner - inner);
      const bool last = inner + n_inner == a_.n_inner;
      for (int64_t col = 0; col < n_cols; col += COLS)
        lay_out(first_col + col, std::min(COLS, n_cols - col), inner, n_inner, operand + col * most);
      for (int64_t done = 0; done < n_rows; done += ROWS) {
        const int64_t row = first_row + done, count = std::min(ROWS, n_rows - done);
        int64_t stride = a_.x_stride;
        const C* x = first_operand<T, C>(static_cast<const T*>(a_.x) + row * stride + inner, stride, count, n_inner);
        for (int64_t col = 0; col < n_cols; col += COLS) {
          const int64_t width = std::min(COLS, n_cols - col);
          float* sum = whole ? sums : sums + (done * panels + col / COLS * ROWS) * COLS;
          multiply(padded(count), padded(width), padded(n_inner), x, stride, operand + col * most, COLS, sum, COLS, inner > 0);
          if (last) finish(sum, row, count, first_col + col, width);
        }
      }
    }
    release<C>();
  }

  // Returns rows as a first operand, with its stride: the rows themselves, or a copy that lasts until the next call.
  // Other sizes than multiples of PAD would need their own kernels.
  template <class From, class To>
  static const To* first_operand(const From* from, int64_t& stride, int64_t n_rows, int64_t n_inner) {
    if constexpr (std::is_same_v<From, To>)
      if (n_rows % PAD == 0 && n_inner % PAD == 0) return from;
    thread_local Buffer<To> buffer;
    const int64_t ld = padded(n_inner);
    To* copy = buffer.at_least(ROWS * ld);
    copy_rows(from, stride, n_rows, n_inner, copy, ld);
    stride = ld;
    return copy;
  }

  void lay_out(int64_t col, int64_t n_cols, int64_t inner, int64_t n_inner, C* operand) const {
    using Narrow = std::conditional_t<(sizeof(W) > sizeof(C)), C, W>;
    constexpr int64_t A_WORD = 4 / sizeof(Narrow);
    const W* weight = static_cast<const W*>(a_.weight);
    if (!a_.transpose) {
      pair_rows(weight + inner * a_.weight_stride + col, a_.weight_stride, n_inner, n_cols, operand, COLS);
    } else {
      for (int64_t c = 0; c < n_cols; c += PAD) {
        int64_t stride = a_.weight_stride;
        const Narrow* rows = first_operand<W, Narrow>(weight + (col + c) * stride + inner, stride,
                                                      std::min(PAD, n_cols - c), n_inner);
        const uint32_t* words = reinterpret_cast<const uint32_t*>(rows);
        if constexpr (std::is_same_v<Narrow, C>) {
          transpose_words(words, stride / A_WORD, PAD, n_inner / A_WORD, reinterpret_cast<uint32_t*>(operand) + c, COLS);
        } else {
          thread_local Buffer<uint32_t> buffer;
          uint32_t* pairs = buffer.at_least(PAD * n_inner / 2);
          transpose_words(words, stride / A_WORD, PAD, n_inner / A_WORD, pairs, PAD);
          widen_pairs(pairs, n_inner, operand + c);
        }
      }
    }
    if constexpr (sizeof(T) < sizeof(W) && std::is_same_v<W, C>)  // the weight is rounded to the dtype of the rows
      for (int64_t i = 0; i < n_inner * COLS; i += LANES)
        store(operand + i, rounded(load(operand + i, AllLanes{}), T{}), AllLanes{});
  }

  // Converts PAD columns of a second operand in bfloat16 to float32.
  static void widen_pairs(const uint32_t* pairs, int64_t n_inner, float* to) {
    for (int64_t i = 0; i < n_inner; i += 2, pairs += PAD, to += 2 * COLS) {
      for (int64_t c = 0; c < PAD; c += LANES) {
        UInt both;
        std::memcpy(&both, pairs + c, sizeof(both));
        store(to + c, bits_as<Float>(both << 16), AllLanes{});
        store(to + COLS + c, bits_as<Float>(both & 0xFFFF0000), AllLanes{});
      }
    }
  }

  void finish(const float* sum, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) const {
    const W* bias = static_cast<const W*>(a_.bias);
    T* y = static_cast<T*>(a_.y) + row * a_.n_cols + col;
    for (int64_t r = 0; r < n_rows; r++, sum += COLS, y += a_.n_cols) {
      for_columns(n_cols, [&](int64_t c, auto lanes) {
        Float value = load(sum + c, lanes);
        if (bias) value += load(bias + col + c, lanes);
        store(y + c, value, lanes);
      });
    }
  }

  const Arguments& a_;
};

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" void fastln_linear(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const auto run = [&](auto rows, auto weight, auto compute) {
    Linear<decltype(rows), decltype(weight), decltype(compute)>(a).run();
  };
  if (a.dtype == FLOAT32) return run(float{}, float{}, float{});
  with_constant(a.parameter_dtype == FLOAT32, [&](auto wide) {
    using W = std::conditional_t<wide, float, bfloat16>;
    a.compute_dtype == FLOAT32 ? run(bfloat16{}, W{}, float{}) : run(bfloat16{}, W{}, bfloat16{});
  });
}
