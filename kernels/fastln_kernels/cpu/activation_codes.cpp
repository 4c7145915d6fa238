// Activations that write codes of what their backward needs, and their backward; fastln_kernels.reference_activation
// and reference_codes define them. Columns are taken in pieces of a multiple of 64, so each piece has whole bytes and
// whole groups.

#include "activation.h"
#include "codes.h"

namespace fastln {
namespace {

static_assert(ELEMENTS_A_BLOCK % 64 == 0);

template <class Function>
void with_bits(int64_t bits, Function&& function) {
  switch (bits) {
    case 8: return function(std::integral_constant<int, 8>{});
    case 4: return function(std::integral_constant<int, 4>{});
    case 2: return function(std::integral_constant<int, 2>{});
  }
}

// The codes of a gated activation's factor, and their scales: rows of bytes and of numbers. Same layout as
// native_codes.Groups.
struct Groups {
  uint8_t* codes;
  int64_t stride;
  float* scale;
  int64_t scale_stride;

  template <int BITS>
  uint8_t* at(int64_t row, int64_t column) const {
    return codes + row * stride + column * BITS / 8;
  }
  template <int BITS>
  float* scale_at(int64_t row, int64_t column) const {
    return scale + row * scale_stride + column / COLUMNS_A_GROUP<BITS>;
  }
};

constexpr int64_t PIECE = 1024;  // columns whose slopes stay in the L1 cache until they are encoded
static_assert(PIECE % COLUMNS_TOGETHER<8> == 0);

struct Piece {
  float values[PIECE], slopes[PIECE];
};

// Computes y = activation(gate), times up if `up` is not null, and likewise the slopes. The result's bits are those of the
// kernel that writes no codes.
template <Kind KIND, class T>
void evaluate(const T* gate, const T* up, T* y, int64_t n_cols, Piece& piece) {
  for_columns(n_cols, [&](int64_t column, auto lanes) {
    const Float x = load(gate + column, lanes), result = value<KIND>(x, T{});
    const Float slope = value_and_slope<KIND>(x, T{}).slope;
    if (up) {
      const Float times = load(up + column, lanes);
      store(y + column, result * times, lanes);
      store(piece.values + column, result, AllLanes{});
      store(piece.slopes + column, KIND == RELU ? select(slope == 0.0f, Float{}, times) : slope * times, AllLanes{});
    } else {
      store(y + column, result, lanes);
      store(piece.slopes + column, slope, AllLanes{});
    }
  });
}

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

// y = activation(x), and the codes of its derivative. Each row is contiguous. `levels`: see codes.h. `rounding` rounds the
// rows of y to 8 bits too, if it is not null.
void fastln_activation_encode(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t kind,
                              int64_t bits, const float* levels, const void* x, int64_t x_stride, void* y,
                              int64_t y_stride, uint8_t* codes, int64_t codes_stride, const Rounding* rounding) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto xs = rows<T>(x, x_stride);
    const auto ys = rows<T>(y, y_stride);
    with_bits(bits, [&](auto width) {
      const Slopes<width> slopes(levels);
      for_pieces(n_rows, n_cols, rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
        Piece piece;
        for (int64_t start = first; start < first + size; start += PIECE) {
          const int64_t count = std::min(PIECE, first + size - start);
          with_kind(kind, [&](auto which) {
            evaluate<which, T>(xs.at(row, start), nullptr, ys.at(row, start), count, piece);
          });
          uint8_t* to = codes + row * codes_stride + start * width / 8;
          for_columns(count, [&](int64_t column, auto lanes) {
            store_codes<width>(to + column * width / 8, slopes.encode(load(piece.slopes + column, AllLanes{})), lanes);
          });
        }
        if (rounding) (*rounding)(row, ys.at(row, first));
      });
    });
  });
}

// dx = dy * activation'(x), from codes.
void fastln_activation_decode(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t kind,
                              int64_t bits, const float* levels, const void* dy, int64_t dy_stride,
                              void* dx, int64_t dx_stride, const uint8_t* codes, int64_t codes_stride,
                              const Rounding* rounding) {
  with_dtype(dtype, [&](auto type) {
    with_constant(kind == RELU, [&](auto selects) {
      with_bits(bits, [&](auto width) {
        using T = decltype(type);
        const auto dys = rows<T>(dy, dy_stride);
        const auto dxs = rows<T>(dx, dx_stride);
        const Slopes<width> slopes(levels);
        for_pieces(n_rows, n_cols, rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
          const T* dy = dys.at(row, first);
          T* dx = dxs.at(row, first);
          const uint8_t* from = codes + row * codes_stride + first * width / 8;
          for_columns(size, [&](int64_t column, auto lanes) {
            const Float gradient = load(dy + column, lanes);
            const Float slope = slopes.decode(load_codes<width>(from + column * width / 8, lanes));
            store(dx + column, selects ? select(slope == 0.0f, Float{}, gradient) : gradient * slope, lanes);
          });
          if (rounding) (*rounding)(row, dx);
        });
      });
    });
  });
}

// y = activation(gate) * up, and the codes of activation(gate) and of up * activation'(gate).
void fastln_gated_encode(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t kind, int64_t bits,
                         const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                         int64_t y_stride, const Groups* values, const Groups* slopes, const Rounding* rounding) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto gates = rows<T>(gate, gate_stride), ups = rows<T>(up, up_stride);
    const auto ys = rows<T>(y, y_stride);
    with_constant(bits == 8, [&](auto is_8) {
      constexpr int BITS = is_8 ? 8 : 4;
      for_pieces(n_rows, n_cols, rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
        Piece piece;
        for (int64_t start = first; start < first + size; start += PIECE) {
          const int64_t count = std::min(PIECE, first + size - start);
          with_kind(kind, [&](auto which) {
            evaluate<which, T>(gates.at(row, start), ups.at(row, start), ys.at(row, start), count, piece);
          });
          encode_groups<BITS>(piece.values, count, values->at<BITS>(row, start), values->scale_at<BITS>(row, start));
          encode_groups<BITS>(piece.slopes, count, slopes->at<BITS>(row, start), slopes->scale_at<BITS>(row, start));
        }
        if (rounding) (*rounding)(row, ys.at(row, first));
      });
    });
  });
}

// dgate = dy * (up * activation'(gate)) and dup = dy * activation(gate), from codes. What is not requested is null.
void fastln_gated_decode(int64_t dtype, int64_t n_threads, int64_t n_rows, int64_t n_cols, int64_t bits,
                         const void* dy, int64_t dy_stride, const Groups* values, const Groups* slopes, void* dgate,
                         int64_t dgate_stride, void* dup, int64_t dup_stride, const Rounding* dgate_rounding,
                         const Rounding* dup_rounding) {
  with_dtype(dtype, [&](auto type) {
    with_constant(bits == 8, [&](auto is_8) {
      using T = decltype(type);
      constexpr int BITS = is_8 ? 8 : 4;
      constexpr int64_t GROUP = COLUMNS_A_GROUP<BITS>;
      const auto dys = rows<T>(dy, dy_stride);
      const auto dgates = rows<T>(dgate, dgate_stride), dups = rows<T>(dup, dup_stride);
      for_pieces(n_rows, n_cols, dgate_rounding || dup_rounding, n_threads, [&](int64_t row, int64_t first, int64_t size) {
        const T* dy = dys.at(row, first);
        T *dgate = dgates.at(row, first), *dup = dups.at(row, first);
        for (int64_t start = 0; start < size; start += GROUP) {
          const auto times = [&](const Groups& groups, T* to) {
            const float scale = *groups.scale_at<BITS>(row, first + start);
            const uint8_t* codes = groups.at<BITS>(row, first + start);
            for_group<BITS>(size - start, [&](int64_t column, auto lanes) {
              const Float factor = load_symmetric<BITS>(codes + column * BITS / 8, lanes) * scale;
              store(to + start + column, load(dy + start + column, lanes) * factor, lanes);
            });
          };
          if (dgate) times(*slopes, dgate);
          if (dup) times(*values, dup);
        }
        if (dgate_rounding) (*dgate_rounding)(row, dgate);
        if (dup_rounding) (*dup_rounding)(row, dup);
      });
    });
  });
}

}  // extern "C"
