// Rows in 8 bits: whole numbers times a scale per row. fastln_kernels.reference_int8 defines them. Numbers are stored with
// 128 added, because the processors' 8-bit products take an unsigned first operand.
#pragma once

#include <algorithm>
#include <limits>

#include "parallel.h"
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
inline __attribute__((always_inline)) void butterflies(Float* x) {
  if constexpr (APART >= LANES) {
    constexpr int STEP = APART / LANES;
#pragma GCC unroll 16
    for (int first = 0; first < VECTORS; first += 2 * STEP) {
#pragma GCC unroll 16
      for (int i = first; i < first + STEP; i++) {
        const Float low = x[i], high = x[i + STEP];
        x[i] = low + high;
        x[i + STEP] = low - high;
      }
    }
  } else if constexpr (APART > 0) {
    Float sign;
    for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & APART ? -1.0f : 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) x[i] = partner<APART>(x[i]) + x[i] * sign;
  }
}

// Keeps compilers from fusing the product that made a number with a sum that follows, which would round otherwise.
inline void settle(Float& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
}

// Multiplies 64 numbers by the Hadamard matrix times 8, in the order of reference_int8.turn.
inline __attribute__((always_inline)) void turn_times_8(Float* x) {
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) settle(x[i]);
  butterflies<32>(x);
  butterflies<16>(x);
  butterflies<8>(x);
  butterflies<4>(x);
  butterflies<2>(x);
  butterflies<1>(x);
}

inline __attribute__((always_inline)) void turn(Float* x) {
  turn_times_8(x);
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) x[i] *= 0.125f;
}

// The largest lane.
template <class Lane, class V>
Lane maximum(V value) {
  if constexpr (sizeof(V) == 2 * sizeof(Lane)) {
    return std::max<Lane>(value[0], value[1]);
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return maximum<Lane, Half>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
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
    return bits_as<float>(maximum<int32_t>(left > right ? left : right));
  }
};

// The largest magnitude of a row.
inline float largest(const float* row, int64_t n_cols) {
  Top top;
  sum_columns(n_cols, [&](int64_t column, auto lanes, int part) { top.take(load(row + column, lanes), part); });
  return top.largest();
}

// Numbers in 16 bits are compared as they are.
template <class T>
float largest(const T* row, int64_t n_cols) {
  typedef int16_t Shorts __attribute__((vector_size(FASTLN_VECTOR_BYTES)));
  Shorts tops[2] = {};
  int64_t column = 0;
  const auto take = [&](Shorts& top, const T* from, int64_t count) {
    Shorts bits{};
    std::memcpy(&bits, from, count * sizeof(T));
    bits &= 0x7FFF;
    top = bits > top ? bits : top;
  };
  for (; column + 4 * LANES <= n_cols; column += 4 * LANES) {
    take(tops[0], row + column, 2 * LANES);
    take(tops[1], row + column + 2 * LANES, 2 * LANES);
  }
  for (; column < n_cols; column += 2 * LANES) take(tops[0], row + column, std::min<int64_t>(2 * LANES, n_cols - column));
  const int16_t top = maximum<int16_t>(tops[0] > tops[1] ? tops[0] : tops[1]);
  return to_float(UShort{} + static_cast<uint16_t>(top), T{})[0];
}

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

// Loads a block of 64 columns.
template <class T>
void load_block(const T* from, Float* block) {
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) block[i] = load(from + i * LANES, AllLanes{});
}

// The same where only `count` columns are inside the row; zeros for the others.
template <class T>
void load_block(const T* from, Float* block, int64_t count) {
  for (int i = 0; i < VECTORS; i++) {
    const int64_t inside = std::clamp<int64_t>(count - i * LANES, 0, LANES);
    block[i] = inside ? load(from + i * LANES, SomeLanes{static_cast<int>(inside)}) : Float{};
  }
}

#if defined(FASTLN_AVX512)
// Packs 64 whole numbers into bytes.
inline __m512i pack(const __m512i* whole) {
  // Each 16 bytes of `bytes` hold four numbers from each vector.
  const __m512i bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
  const __m512i places = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_epi32(places, bytes);
}
#endif

// Rounds 64 numbers to nearest even, and stores them with ZERO added.
inline void store_rounded(const Float* block, float inverse, uint8_t* to) {
#if defined(FASTLN_AVX512)
  __m512i whole[VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) whole[i] = _mm512_cvtps_epi32(bits_as<__m512>(block[i] * inverse));
  _mm512_storeu_si512(to, _mm512_xor_si512(pack(whole), _mm512_set1_epi8(static_cast<char>(ZERO))));
#else
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) {
    const Float value = block[i] * inverse;
    for (int lane = 0; lane < LANES; lane++)
      to[i * LANES + lane] = static_cast<uint8_t>(__builtin_lrintf(value[lane]) + ZERO);
  }
#endif
}

// The same, stored with their signs; returns their sum.
inline int32_t store_signed(const Float* block, float inverse, int8_t* to) {
#if defined(FASTLN_AVX512)
  __m512i whole[VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) whole[i] = _mm512_cvtps_epi32(bits_as<__m512>(block[i] * inverse));
  _mm512_storeu_si512(to, pack(whole));
  const __m512i low = _mm512_add_epi32(whole[0], whole[1]), high = _mm512_add_epi32(whole[2], whole[3]);
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
#else
  int32_t sum = 0;
  for (int i = 0; i < VECTORS; i++) {
    const Float value = block[i] * inverse;
    for (int lane = 0; lane < LANES; lane++) {
      to[i * LANES + lane] = static_cast<int8_t>(__builtin_lrintf(value[lane]));
      sum += to[i * LANES + lane];
    }
  }
  return sum;
#endif
}

template <class T>
void store_rounded(const T* from, float inverse, uint8_t* to) {
  Float block[VECTORS];
  load_block(from, block);
  store_rounded(block, inverse, to);
}

#if defined(FASTLN_AVX512)
// Odd and even columns are widened apart, which takes no permutations.
inline void store_rounded(const bfloat16* from, float inverse, uint8_t* to) {
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i pairs = _mm512_loadu_si512(from + 32 * i);
    const auto whole = [&](__m512i bits) { return _mm512_cvtps_epi32(bits_as<__m512>(bits_as<Float>(bits) * inverse)); };
    const __m512i even = whole(_mm512_slli_epi32(pairs, 16));
    const __m512i odd = whole(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
    words[i] = _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
  }
  const __m512i bytes = _mm512_packs_epi16(words[0], words[1]);  // eight of each, in turn
  const __m512i ordered = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes);
  _mm512_storeu_si512(to, _mm512_xor_si512(ordered, _mm512_set1_epi8(static_cast<char>(ZERO))));
}
#endif

// Rounds a row, and fills up to `n_padded` columns with zeros.
template <class T>
void store_row(const T* row, int64_t n_cols, int64_t n_padded, float inverse, uint8_t* to) {
  if (inverse == 0) {
    std::memset(to, ZERO, n_padded);
    return;
  }
  int64_t column = 0;
  for (; column + TURNED <= n_cols; column += TURNED) store_rounded(row + column, inverse, to + column);
  for (; column < n_padded; column += TURNED) {
    Float block[VECTORS];
    uint8_t bytes[TURNED];
    load_block(row + column, block, n_cols - column);
    store_rounded(block, inverse, bytes);
    std::memcpy(to + column, bytes, std::min(TURNED, n_padded - column));
  }
}

// Rounds a row after products with factors or turning. `work` holds `n_padded` numbers, a multiple of 64.
template <bool TURNS, class T>
float quantise_changed_row(const T* x, const float* factors, int64_t n_cols, int64_t n_padded, float* work, uint8_t* to) {
  Top top;
  const auto block = [&](int64_t column, auto... count) __attribute__((always_inline)) {
    Float values[VECTORS];
    load_block(x + column, values, count...);
    if (!TURNS || factors) {
      Float by[VECTORS];
      load_block(factors + column, by, count...);
#pragma GCC unroll 16
      for (int i = 0; i < VECTORS; i++) values[i] *= by[i];
    }
    if (TURNS) turn_times_8(values);
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) {
      top.take(values[i], i % PARTS);
      store(work + column + i * LANES, values[i], AllLanes{});
    }
  };
  int64_t column = 0;
  for (; column + TURNED <= n_cols; column += TURNED) block(column);
  if (column < n_cols) block(column, n_cols - column);
  constexpr float UNIT = TURNS ? 0.125f : 1.0f;  // exact
  const Scale scale(top.largest() * UNIT);
  store_row(work, n_padded, n_padded, scale.inverse * UNIT, to);
  return scale.scale;
}

// Rounds a row, times `factors` if they are not null; returns its scale. With factors or turning, `work` holds `n_padded`
// numbers, a multiple of 64.
template <class T>
float quantise_row(const T* x, const float* factors, bool turned, int64_t n_cols, int64_t n_padded, float* work,
                   uint8_t* to) {
  if (turned) return quantise_changed_row<true>(x, factors, n_cols, n_padded, work, to);
  if (factors) return quantise_changed_row<false>(x, factors, n_cols, n_padded, work, to);
  const Scale scale(largest(x, n_cols));
  store_row(x, n_cols, n_padded, scale.inverse, to);
  return scale.scale;
}

// Rounds what the rounding of a row has left over; returns its scale. `work` holds the row and then what is left, `done` the
// row's rounded numbers.
inline float quantise_rest(float* work, const uint8_t* done, float scale, int64_t n_padded, uint8_t* to) {
  Top top;
  for (int64_t column = 0; column < n_padded; column += LANES) {
    Float whole;
#if defined(FASTLN_AVX512)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(done + column));
    whole = bits_as<Float>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
#else
    for (int lane = 0; lane < LANES; lane++) whole[lane] = done[column + lane];
#endif
    const Float rest = load(work + column, AllLanes{}) - (whole - static_cast<float>(ZERO)) * scale;
    top.take(rest, column / LANES % PARTS);
    store(work + column, rest, AllLanes{});
  }
  const Scale of_rest(top.largest());
  store_row(work, n_padded, n_padded, of_rest.inverse, to);
  return of_rest.scale;
}

// Where a kernel writes the rows that it makes in 8 bits too, while they are in the cache. Same layout as
// native_int8.Rounding. `factors` may be null.
struct Rounding {
  int64_t n_cols, n_padded, turned;
  const float* factors;
  uint8_t* values;
  float* scale;

  template <class T>
  void operator()(int64_t row, const T* x) const {
    thread_local Buffer<float> buffer;
    float* work = buffer.at_least(n_padded);
    scale[row] = quantise_row(x, factors, turned, n_cols, n_padded, work, values + row * n_padded);
  }
};

}  // namespace fastln
