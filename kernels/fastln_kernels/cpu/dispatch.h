// Turns run-time values (dtypes, flags) into compile-time types and constants.
#pragma once

#include <type_traits>

#include "vector.h"

namespace fastln {

// The dtypes of fastln_kernels.cpu.library.DTYPES, in its order, and that of 8-bit products.
enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8 };

template <class Function>
void with_dtype(int64_t dtype, Function&& function) {
  switch (dtype) {
    case FLOAT32: return function(float{});
    case BFLOAT16: return function(bfloat16{});
    case FLOAT16: return function(float16{});
  }
}

template <class Next>
void with_constant(bool value, Next&& next) {
  value ? next(std::true_type{}) : next(std::false_type{});
}

}  // namespace fastln
