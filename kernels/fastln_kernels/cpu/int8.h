// Rows in 8 bits: whole numbers times a scale per row. fastln_kernels.reference_int8 defines them. Numbers are stored with
// 128 added, because the processors' 8-bit products take an unsigned first operand.
#pragma once

#include <limits>

#include "vector.h"

namespace fastln {

constexpr float LARGEST = 127, SMALLEST = 1e-30f;
constexpr int64_t TURNED = 64;  // columns of a block that is turned
constexpr int64_t ZERO = 128;   // how a zero is stored
constexpr int VECTORS = TURNED / LANES;  // of such a block

// Each lane's value from the lane `APART` away.
template <int APART>
inline Float partner(Float x) {
#if defined(FASTLN_AVX512)
  const __m512 value = bits_as<__m512>(x);
  if constexpr (APART == 1) return bits_as<Float>(_mm512_permute_ps(value, 0xB1));
  if constexpr (APART == 2) return bits_as<Float>(_mm512_permute_ps(value, 0x4E));
  if constexpr (APART == 4) return bits_as<Float>(_mm512_shuffle_f32x4(value, value, 0xB1));
  return bits_as<Float>(_mm512_shuffle_f32x4(value, value, 0x4E));
#else
  Float result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = x[lane ^ APART];
  return result;
#endif
}

// One step of `turn`: sums and differences of numbers `APART` columns apart.
template <int APART>
inline void butterflies(Float* x) {
  if constexpr (APART >= LANES) {
    constexpr int STEP = APART / LANES;
    for (int first = 0; first < VECTORS; first += 2 * STEP) {
      for (int i = first; i < first + STEP; i++) {
        const Float low = x[i], high = x[i + STEP];
        x[i] = low + high;
        x[i + STEP] = low - high;
      }
    }
  } else if constexpr (APART > 0) {
    Float sign;
    for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & APART ? -1.0f : 1.0f;
    for (int i = 0; i < VECTORS; i++) x[i] = partner<APART>(x[i]) + x[i] * sign;
  }
}

// Multiplies 64 numbers by the Hadamard matrix, in the order of reference_int8.turn.
inline void turn(Float* x) {
  butterflies<32>(x);
  butterflies<16>(x);
  butterflies<8>(x);
  butterflies<4>(x);
  butterflies<2>(x);
  butterflies<1>(x);
  for (int i = 0; i < VECTORS; i++) x[i] *= 0.125f;
}

// The largest magnitude, as bits: they order like the magnitudes, and Inf and NaN come last.
struct Top {
  Int bits[PARTS] = {};

  void take(Float value, int part) {
    const Int magnitude = bits_as<Int>(value) & 0x7FFFFFFF;
    bits[part] = magnitude > bits[part] ? magnitude : bits[part];
  }

  float largest() const {
    const Int left = bits[0] > bits[1] ? bits[0] : bits[1], right = bits[2] > bits[3] ? bits[2] : bits[3];
    const Int both = left > right ? left : right;
#if defined(FASTLN_AVX512)
    return bits_as<float>(_mm512_reduce_max_epi32(bits_as<__m512i>(both)));
#else
    int32_t top = both[0];
    for (int lane = 1; lane < LANES; lane++) top = std::max(top, both[lane]);
    return bits_as<float>(top);
#endif
  }
};

struct Scale {
  float scale, inverse;

  explicit Scale(float top) {
    if (!(top < std::numeric_limits<float>::infinity())) {
      scale = std::numeric_limits<float>::quiet_NaN(), inverse = 0;
    } else if (top < SMALLEST) {
      scale = inverse = 0;
    } else {
      scale = top / LARGEST, inverse = LARGEST / top;
    }
  }
};

// Rounds to nearest even, and stores with ZERO added.
inline void store_rounded(uint8_t* to, Float value) {
#if defined(FASTLN_AVX512)
  const __m512i whole = _mm512_cvtps_epi32(bits_as<__m512>(value));
  const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(static_cast<char>(ZERO)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#else
  for (int lane = 0; lane < LANES; lane++) to[lane] = static_cast<uint8_t>(__builtin_lrintf(value[lane]) + ZERO);
#endif
}

// Rounds `n_cols` float32 numbers, and fills up to `n_padded` columns with zeros. Both arrays hold `n_padded` numbers.
inline void store_row(const float* row, int64_t n_cols, int64_t n_padded, Scale scale, uint8_t* to) {
  if (scale.inverse == 0) {
    std::memset(to, ZERO, n_padded);
    return;
  }
  int64_t column = 0;
  for (; column < n_cols; column += LANES) store_rounded(to + column, load(row + column, AllLanes{}) * scale.inverse);
  std::memset(to + n_cols, ZERO, n_padded - n_cols);
}

// Rounds a row, times `factors` if they are not null; returns its scale. `work` holds `n_padded` numbers, which are a
// multiple of 64.
template <class T>
float quantise_row(const T* x, const float* factors, bool turned, int64_t n_cols, int64_t n_padded, float* work,
                   uint8_t* to) {
  Top top;
  if (turned) {
    for (int64_t column = 0; column < n_cols; column += TURNED) {
      Float block[VECTORS];
      for (int i = 0; i < VECTORS; i++) {
        block[i] = load(x + column + i * LANES, AllLanes{});
        if (factors) block[i] *= load(factors + column + i * LANES, AllLanes{});
      }
      turn(block);
      for (int i = 0; i < VECTORS; i++) {
        top.take(block[i], i % PARTS);
        store(work + column + i * LANES, block[i], AllLanes{});
      }
    }
  } else {
    sum_columns(n_cols, [&](int64_t column, auto lanes, int part) {
      Float value = load(x + column, lanes);
      if (factors) value *= load(factors + column, lanes);
      top.take(value, part);
      store(work + column, value, AllLanes{});
    });
  }
  const Scale scale(top.largest());
  store_row(work, n_cols, n_padded, scale, to);
  return scale.scale;
}

}  // namespace fastln
