// Vectors as wide as the machine's registers, with the compilers' vector extensions: loads that widen to float32,
// stores that round to nearest even, selection, sums. Everything works lane by lane, so NaN and Inf pass through.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTLN_AVX512 1
#define FASTLN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTLN_VECTOR_BYTES 32
#else
#define FASTLN_VECTOR_BYTES 16
#endif

namespace fastln {

constexpr int LANES = FASTLN_VECTOR_BYTES / 4;

using Float = float __attribute__((vector_size(FASTLN_VECTOR_BYTES)));
using UInt = uint32_t __attribute__((vector_size(FASTLN_VECTOR_BYTES)));
using Int = int32_t __attribute__((vector_size(FASTLN_VECTOR_BYTES)));
using ULong = uint64_t __attribute__((vector_size(FASTLN_VECTOR_BYTES)));
using UShort = uint16_t __attribute__((vector_size(FASTLN_VECTOR_BYTES / 2)));

// The 16-bit types, as stored in memory. float16 is IEEE half precision.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// How many lanes of a vector are inside the row: all of them (known at compile time), or the rest of the row.
struct AllLanes {
  static constexpr int count = LANES;
};
struct SomeLanes {
  int count;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Float broadcast(float value) { return Float{} + value; }
inline UInt broadcast(uint32_t value) { return UInt{} + value; }

// Selects `yes` in lanes where `mask` is all ones, and `no` where it is 0.
inline UInt select(Int mask, UInt yes, UInt no) { return mask ? yes : no; }
inline Float select(Int mask, Float yes, Float no) { return mask ? yes : no; }

inline Float lane_numbers() {
  Float numbers{};
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = static_cast<float>(lane);
  return numbers;
}

// Sets the lanes outside the row to zero.
inline Float inside(Float value, AllLanes) { return value; }
inline Float inside(Float value, SomeLanes lanes) {
  return select(lane_numbers() < broadcast(static_cast<float>(lanes.count)), value, Float{});
}

template <int BYTES>
struct FloatsOf {
  typedef float Vector __attribute__((vector_size(BYTES)));
};

template <class V>
inline float sum(V value) {
  if constexpr (sizeof(V) == 8) {
    return value[0] + value[1];
  } else {
    typename FloatsOf<sizeof(V) / 2>::Vector halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum(halves[0] + halves[1]);
  }
}

// --- widening and rounding -------------------------------------------------------------------------------------------

// These use named instructions where GCC would compile __builtin_convertvector into several.
inline UInt widen(UShort bits) {
#if defined(FASTLN_AVX512)
  return bits_as<UInt>(_mm512_cvtepu16_epi32(bits_as<__m256i>(bits)));
#elif FASTLN_VECTOR_BYTES == 32
  return bits_as<UInt>(_mm256_cvtepu16_epi32(bits_as<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, UInt);
#endif
}

// For lanes below 2^16.
inline UShort narrow(UInt bits) {
#if defined(FASTLN_AVX512)
  return bits_as<UShort>(_mm512_cvtepi32_epi16(bits_as<__m512i>(bits)));
#elif FASTLN_VECTOR_BYTES == 32
  const __m256i all = bits_as<__m256i>(bits);
  return bits_as<UShort>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(bits, UShort);
#endif
}

inline Float to_float(UShort bits, bfloat16) {
#if defined(FASTLN_AVX512)
  // One instruction instead of two: it moves every number to the upper half of its lane and zeros the lower half.
  const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  return bits_as<Float>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, places, _mm512_castsi256_si512(bits_as<__m256i>(bits))));
#else
  return bits_as<Float>(widen(bits) << 16);
#endif
}

inline UShort from_float(Float value, bfloat16) {
#if defined(FASTLN_AVX512) && defined(__AVX512BF16__)
  return bits_as<UShort>(_mm512_cvtneps_pbh(bits_as<__m512>(value)));  // treats numbers below 2^-126 as 0
#elif defined(FASTLN_AVX512)
  const __m512i bits = bits_as<__m512i>(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(bits_as<__m512>(value), bits_as<__m512>(value), _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  // One instruction takes the upper halves: a shift and a narrowing are three.
  const __m512i upper = _mm512_set_epi64(0, 0, 0, 0, 0x001F001D001B0019, 0x0017001500130011, 0x000F000D000B0009,
                                         0x0007000500030001);
  return bits_as<UShort>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, all)));
#else
  const UInt bits = bits_as<UInt>(value);
  const UInt rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return narrow(select(value != value, bits | 0x400000, rounded) >> 16);
#endif
}

inline Float to_float(UShort half, float16) {
#if defined(FASTLN_AVX512)
  return bits_as<Float>(_mm512_cvtph_ps(bits_as<__m256i>(half)));
#elif FASTLN_VECTOR_BYTES == 32 && defined(__F16C__)
  return bits_as<Float>(_mm256_cvtph_ps(bits_as<__m128i>(half)));
#else
  const UInt bits = widen(half), magnitude = bits & 0x7FFF;
  // The shift aligns exponent and fraction. The product changes the exponent's bias from 15 to 127, also for
  // subnormals.
  const Float finite = bits_as<Float>(magnitude << 13) * broadcast(0x1p112f);
  const UInt special = (magnitude << 13) | 0x7F800000;
  return bits_as<Float>(select(magnitude >= 0x7C00, special, bits_as<UInt>(finite)) | ((bits & 0x8000) << 16));
#endif
}

inline UShort from_float(Float value, float16) {
#if defined(FASTLN_AVX512)
  return bits_as<UShort>(_mm512_cvtps_ph(bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTLN_VECTOR_BYTES == 32 && defined(__F16C__)
  return bits_as<UShort>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const UInt bits = bits_as<UInt>(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const UInt normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // After adding 0.5, the last place of the sum is that of a subnormal half-precision number, 2^-24.
  const UInt subnormal = bits_as<UInt>(bits_as<Float>(magnitude) + broadcast(0.5f)) - 0x3F000000;
  UInt half = select(magnitude < (113u << 23), subnormal, normal);
  half = select(magnitude >= 0x477FF000, broadcast(uint32_t{0x7C00}), half);  // from 65,520 on: infinity
  half = select(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> 13) & 0x3FF), half);
  return narrow(half | sign);
#endif
}

// --- memory ----------------------------------------------------------------------------------------------------------

inline Float load(const float* from, AllLanes) {
  Float value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Float value, AllLanes) { std::memcpy(to, &value, sizeof(value)); }

template <class T>
inline Float load(const T* from, AllLanes) {
  UShort bits;
  std::memcpy(&bits, from, sizeof(bits));
  return to_float(bits, T{});
}

template <class T>
inline void store(T* to, Float value, AllLanes) {
  const UShort bits = from_float(value, T{});
  std::memcpy(to, &bits, sizeof(bits));
}

// Loads zeros in lanes outside the row.
#if defined(FASTLN_AVX512)
inline __mmask16 mask_of(SomeLanes lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1); }

inline Float load(const float* from, SomeLanes lanes) {
  return bits_as<Float>(_mm512_maskz_loadu_ps(mask_of(lanes), from));
}

inline void store(float* to, Float value, SomeLanes lanes) {
  _mm512_mask_storeu_ps(to, mask_of(lanes), bits_as<__m512>(value));
}

template <class T>
inline Float load(const T* from, SomeLanes lanes) {
  return to_float(bits_as<UShort>(_mm256_maskz_loadu_epi16(mask_of(lanes), from)), T{});
}

template <class T>
inline void store(T* to, Float value, SomeLanes lanes) {
  _mm256_mask_storeu_epi16(to, mask_of(lanes), bits_as<__m256i>(from_float(value, T{})));
}
#else
template <class T>
inline Float load(const T* from, SomeLanes lanes) {
  T all[LANES] = {};
  std::memcpy(all, from, lanes.count * sizeof(T));
  return load(all, AllLanes{});
}

template <class T>
inline void store(T* to, Float value, SomeLanes lanes) {
  T all[LANES];
  store(all, value, AllLanes{});
  std::memcpy(to, all, lanes.count * sizeof(T));
}
#endif

// The value that a load after a store would return.
template <class T>
inline Float rounded(Float value, T type) {
  return to_float(from_float(value, type), type);
}
inline Float rounded(Float value, float) { return value; }

// --- loops over the columns of a row ---------------------------------------------------------------------------------

constexpr int PARTS = 4;

// Partial sums, so that additions do not wait for each other.
struct Sum {
  Float parts[PARTS] = {};

  float total() const { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// Calls `body(column, lanes)` for every vector of columns.
template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t n_cols, Body&& body) {
  int64_t column = 0;
  for (; column + LANES <= n_cols; column += LANES) body(column, AllLanes{});
  if (column < n_cols) body(column, SomeLanes{static_cast<int>(n_cols - column)});
}

// Calls `body(column, lanes, part)` for every vector of columns. `part` is the index of the partial sum to add to.
template <class Body>
inline __attribute__((always_inline)) void sum_columns(int64_t n_cols, Body&& body) {
  int64_t column = 0;
  for (; column + PARTS * LANES <= n_cols; column += PARTS * LANES) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) body(column + part * LANES, AllLanes{}, part);
  }
  for (; column + LANES <= n_cols; column += LANES) body(column, AllLanes{}, 0);
  if (column < n_cols) body(column, SomeLanes{static_cast<int>(n_cols - column)}, 0);
}

}  // namespace fastln
