// Activations for CPUs, plain and gated, forward and backward; fastln_kernels.reference_activation defines them.

#include "activation.h"
#include "int8.h"

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
