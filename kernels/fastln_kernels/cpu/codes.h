// Codes in 8, 4 or 2 bits, written and read a vector of columns at a time; fastln_kernels.reference_codes defines them.
#pragma once

#include <algorithm>
#include <limits>

#include "functions.h"
#include "int8.h"

namespace fastln {

constexpr int NAN_8 = 255, NAN_4 = 15;  // the codes of a derivative that is NaN
constexpr int ZERO_4 = 8;               // what is added to symmetric codes of 4 bits

// The largest symmetric code.
template <int BITS>
constexpr float LARGEST_CODE = BITS == 8 ? 127.0f : 7.0f;

// How many columns share a scale.
template <int BITS>
constexpr int64_t COLUMNS_A_GROUP = BITS == 8 ? 64 : 32;

constexpr int64_t code_bytes(int64_t n_codes, int bits) { return (n_codes * bits + 7) / 8; }

// The nearest whole numbers, ties to even, for magnitudes below 2^22.
inline Int whole(Float x) {
#if defined(FASTLN_AVX512)
  return bits_as<Int>(_mm512_cvtps_epi32(bits_as<__m512>(x)));
#else
  return __builtin_convertvector(nearest(x), Int);
#endif
}

// --- bytes -----------------------------------------------------------------------------------------------------------

#if defined(FASTLN_AVX512)
inline void store_some(void* to, __m128i bytes, int64_t count, int size) {
  if (count == size)  // known at compile time for whole vectors
    std::memcpy(to, &bytes, size);
  else
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), bytes);
}
inline __m128i load_some(const void* from, int64_t count, int size) {
  if (count != size) return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, from, size);
  return bytes;
}
#endif

// Sets the codes outside the row to zero.
inline Int inside(Int codes, AllLanes) { return codes; }
inline Int inside(Int codes, SomeLanes lanes) {
  return codes & (lane_numbers() < broadcast(static_cast<float>(lanes.count)));
}

// Writes a vector of codes of BITS bits (other bits count only if they are those of a negative number of 8), in as many
// bytes as they need.
template <int BITS, class Lanes>
inline void store_codes(uint8_t* to, Int codes, Lanes lanes) {
  codes = inside(codes, lanes);
  const int64_t n_bytes = code_bytes(lanes.count, BITS);
#if defined(FASTLN_AVX512)
  __m512i all = bits_as<__m512i>(codes);
  if constexpr (BITS == 8) return store_some(to, _mm512_cvtepi32_epi8(all), n_bytes, 16);
  // Neighbours move together: the upper half of each 64 bits comes down beside the lower half.
  all = _mm512_or_si512(all, _mm512_srli_epi64(all, 32 - BITS));
  if constexpr (BITS == 4) return store_some(to, _mm512_cvtepi64_epi8(all), n_bytes, 8);
  __m256i pairs = _mm512_cvtepi64_epi32(_mm512_and_si512(all, _mm512_set1_epi64(15)));
  pairs = _mm256_or_si256(pairs, _mm256_srli_epi64(pairs, 28));
  store_some(to, _mm256_cvtepi64_epi8(pairs), n_bytes, 4);
#else
  constexpr int A_BYTE = 8 / BITS;
  for (int64_t byte = 0; byte < n_bytes; byte++) {
    int bits = 0;
    for (int i = 0; i < A_BYTE; i++) bits |= codes[byte * A_BYTE + i] << (i * BITS);
    to[byte] = static_cast<uint8_t>(bits);
  }
#endif
}

// Reads them.
template <int BITS, class Lanes>
inline Int load_codes(const uint8_t* from, Lanes lanes) {
  const int64_t n_bytes = code_bytes(lanes.count, BITS);
#if defined(FASTLN_AVX512)
  const __m128i bytes = load_some(from, n_bytes, 2 * BITS);
  if constexpr (BITS == 8) return bits_as<Int>(_mm512_cvtepu8_epi32(bytes));
  if constexpr (BITS == 4) {
    const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
    const __m512i all = _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
    return bits_as<Int>(_mm512_and_si512(all, _mm512_set1_epi32(15)));
  }
  const __m512i shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return bits_as<Int>(_mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcastd_epi32(bytes), shifts), _mm512_set1_epi32(3)));
#else
  constexpr int A_BYTE = 8 / BITS;
  Int codes{};
  for (int64_t byte = 0; byte < n_bytes; byte++)
    for (int i = 0; i < A_BYTE; i++) codes[byte * A_BYTE + i] = from[byte] >> (i * BITS) & ((1 << BITS) - 1);
  return codes;
#endif
}

// Codes of 8 bits, as numbers.
template <class Lanes>
inline Float load_signed(const int8_t* from, Lanes lanes) {
#if defined(FASTLN_AVX512)
  return bits_as<Float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_some(from, lanes.count, 16))));
#else
  int8_t bytes[LANES] = {};
  std::memcpy(bytes, from, lanes.count);
  Int codes{};
  for (int lane = 0; lane < LANES; lane++) codes[lane] = bytes[lane];
  return __builtin_convertvector(codes, Float);
#endif
}
inline Float load(const int8_t* from, AllLanes lanes) { return load_signed(from, lanes); }
inline Float load(const int8_t* from, SomeLanes lanes) { return load_signed(from, lanes); }

// --- symmetric codes: numbers times a scale --------------------------------------------------------------------------

// Codes of 4 bits have ZERO_4 added. `inverse` is 0 where the scale is 0 or NaN: then all codes are 0.
template <int BITS>
inline Int symmetric(Float value, float inverse) {
  const Int codes = inverse == 0 ? Int{} : whole(value * inverse);
  return BITS == 4 ? codes + ZERO_4 : codes;
}

// Writes the symmetric codes of 64 numbers; with 4 bits the scales of their two halves differ.
template <int BITS>
inline void store_symmetric(const float* numbers, float first_inverse, float second_inverse, uint8_t* to) {
#if defined(FASTLN_AVX512)
  __m512i codes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const float inverse = i < 2 ? first_inverse : second_inverse;
    codes[i] = bits_as<__m512i>(symmetric<8>(load(numbers + i * LANES, AllLanes{}), inverse));
  }
  __m512i bytes = pack(codes);
  if constexpr (BITS == 8) {
    _mm512_storeu_si512(to, bytes);
  } else {
    bytes = _mm512_add_epi8(bytes, _mm512_set1_epi8(ZERO_4));
    const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(16 << 8 | 1));  // of neighbours
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(pairs));
  }
#else
  for (int64_t column = 0; column < 64; column += LANES) {
    const Int codes = symmetric<BITS>(load(numbers + column, AllLanes{}), column < 32 ? first_inverse : second_inverse);
    store_codes<BITS>(to + column * BITS / 8, codes, AllLanes{});
  }
#endif
}

// Reads them as numbers without that.
template <int BITS, class Lanes>
inline Float load_symmetric(const uint8_t* from, Lanes lanes) {
  if constexpr (BITS == 8) return load_signed(reinterpret_cast<const int8_t*>(from), lanes);
#if defined(FASTLN_AVX512)
  // As in `load_codes`; the permutation looks at the lowest four bits alone.
  const __m512i pairs = _mm512_cvtepu8_epi64(load_some(from, code_bytes(lanes.count, 4), 8));
  const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  return bits_as<Float>(_mm512_permutexvar_ps(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), numbers));
#endif
  return __builtin_convertvector(load_codes<BITS>(from, lanes) - ZERO_4, Float);
}

// Calls `body(column, lanes)` for the vectors of a group of which `count` columns or more are inside the row.
template <int BITS, class Body>
inline __attribute__((always_inline)) void for_group(int64_t count, Body&& body) {
  constexpr int64_t GROUP = COLUMNS_A_GROUP<BITS>;
  if (count < GROUP) return for_columns(count, body);
#pragma GCC unroll 16
  for (int64_t column = 0; column < GROUP; column += LANES) body(column, AllLanes{});
}

constexpr int GROUPS_TOGETHER = 16;  // whose scales are computed together

// Their columns.
template <int BITS>
constexpr int64_t COLUMNS_TOGETHER = GROUPS_TOGETHER * COLUMNS_A_GROUP<BITS>;

// Writes the largest magnitude of each of 16 groups.
template <int BITS>
void find_tops(const float* numbers, float* tops) {
  constexpr int64_t GROUP = COLUMNS_A_GROUP<BITS>;
#if defined(FASTLN_AVX512)
  // The largest lanes of 16 vectors: each step joins two vectors and halves the lanes that belong to one of them.
  __m512i top[GROUPS_TOGETHER];
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
#pragma GCC unroll 16
  for (int group = 0; group < GROUPS_TOGETHER; group++) {
    top[group] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t column = 0; column < GROUP; column += LANES)
      top[group] = _mm512_max_epi32(
          top[group], _mm512_and_si512(_mm512_loadu_si512(numbers + group * GROUP + column), magnitude));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    top[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(top[i], top[i + 8]), _mm512_unpackhi_epi32(top[i], top[i + 8]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    top[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(top[i], top[i + 4]), _mm512_unpackhi_epi64(top[i], top[i + 4]));
  const auto join = [](__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  const __m512i all = join(join(top[0], top[1]), join(top[2], top[3]));
  const __m512i places = _mm512_set_epi32(15, 11, 7, 3, 13, 9, 5, 1, 14, 10, 6, 2, 12, 8, 4, 0);
  _mm512_storeu_si512(tops, _mm512_permutexvar_epi32(places, all));
#else
  for (int group = 0; group < GROUPS_TOGETHER; group++) tops[group] = largest(numbers + group * GROUP, GROUP);
#endif
}

// Encodes numbers in groups. What is behind the last column, up to a multiple of 16 groups, is overwritten with zeros.
template <int BITS>
void encode_groups(float* numbers, int64_t n_cols, uint8_t* codes, float* scales) {
  constexpr int64_t GROUP = COLUMNS_A_GROUP<BITS>, TOGETHER = COLUMNS_TOGETHER<BITS>;
  std::fill(numbers + n_cols, numbers + (n_cols + TOGETHER - 1) / TOGETHER * TOGETHER, 0.0f);
  for (int64_t start = 0; start < n_cols; start += TOGETHER) {
    float scale[GROUPS_TOGETHER], inverse[GROUPS_TOGETHER];
    find_tops<BITS>(numbers + start, scale);
    for_columns(GROUPS_TOGETHER, [&](int64_t group, auto lanes) {
      const Float top = load(scale + group, lanes), infinity = broadcast(std::numeric_limits<float>::infinity());
      const Int is_zero = top < SMALLEST, is_finite = top < infinity;
      store(inverse + group, select(is_finite & ~is_zero, LARGEST_CODE<BITS> / top, Float{}), lanes);
      const Float nan = broadcast(std::numeric_limits<float>::quiet_NaN());
      store(scale + group, select(is_finite, select(is_zero, Float{}, top / LARGEST_CODE<BITS>), nan), lanes);
    });
    const int64_t n_groups = std::min<int64_t>((n_cols - start + GROUP - 1) / GROUP, GROUPS_TOGETHER);
    std::copy_n(scale, n_groups, scales + start / GROUP);
    const int64_t size = std::min(n_cols - start, TOGETHER);
    int64_t group = 0;
    for (; (group * GROUP + 64) <= size; group += 64 / GROUP) {
      const int64_t first = start + group * GROUP;
      store_symmetric<BITS>(numbers + first, inverse[group], inverse[group + 64 / GROUP - 1], codes + first * BITS / 8);
    }
    for (; group < n_groups; group++) {
      const int64_t first = start + group * GROUP;
      for_group<BITS>(n_cols - first, [&](int64_t column, auto lanes) {
        const Int whole = symmetric<BITS>(load(numbers + first + column, AllLanes{}), inverse[group]);
        store_codes<BITS>(codes + (first + column) * BITS / 8, whole, lanes);
      });
    }
  }
}

// --- codes of derivatives --------------------------------------------------------------------------------------------

// With 8 bits `levels` are the code of 0 and the number of steps from 0 to 1; else the levels, and then the numbers half
// way between them. In the order of native_codes.levels.
template <int BITS>
class Slopes {
 public:
  explicit Slopes(const float* levels) {
    if constexpr (BITS == 8) {
      zero_ = levels[0], steps_ = levels[1], step_ = 1 / levels[1];
      return;
    }
    constexpr int N_LEVELS = BITS == 4 ? 15 : 4;
    std::fill_n(levels_, 16, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(bounds_, 32, std::numeric_limits<float>::infinity());
    std::copy_n(levels, N_LEVELS, levels_);
    std::copy_n(levels + N_LEVELS, N_LEVELS - 1, bounds_);
  }

  Int encode(Float slope) const {
    if constexpr (BITS == 8) {
#if defined(FASTLN_AVX512)
      // A slope that is not a number becomes -2^31, which is the largest as an unsigned number.
      const __m512i codes = bits_as<__m512i>(whole(slope * steps_ + zero_));
      return bits_as<Int>(_mm512_min_epu32(codes, _mm512_set1_epi32(NAN_8)));
#else
      const Int nan = slope != slope;
      const Int codes = whole(select(nan, Float{}, slope) * steps_ + zero_);
      return (codes & ~nan) | (nan & NAN_8);
#endif
    }
#if defined(FASTLN_AVX512)
    const __m512 value = bits_as<__m512>(slope);
    const auto below = [&](__m512 bounds) { return _mm512_cmp_ps_mask(bounds, value, _CMP_LT_OQ); };
    if constexpr (BITS == 4) {
      // The number of bounds below, a bit at a time.
      const auto bound = [&](__m512i code, int more) {
        return _mm512_permutexvar_ps(code, _mm512_loadu_ps(bounds_ + more));
      };
      __m512i code = _mm512_maskz_set1_epi32(below(_mm512_set1_ps(bounds_[7])), 8);
      code = _mm512_mask_or_epi32(code, below(bound(code, 3)), code, _mm512_set1_epi32(4));
      code = _mm512_mask_or_epi32(code, below(bound(code, 1)), code, _mm512_set1_epi32(2));
      code = _mm512_mask_or_epi32(code, below(bound(code, 0)), code, _mm512_set1_epi32(1));
      return bits_as<Int>(_mm512_mask_set1_epi32(code, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), NAN_4));
    }
#endif
    Int code{};
    for (int i = 0; i < (BITS == 4 ? 14 : 3); i++) code -= broadcast(bounds_[i]) < slope;
    if constexpr (BITS == 4) code |= (slope != slope) & NAN_4;
    return code;
  }

  Float decode(Int codes) const {
    if constexpr (BITS == 8) {
      const Float slope = (__builtin_convertvector(codes, Float) - zero_) * step_;
      return select(codes == NAN_8, broadcast(std::numeric_limits<float>::quiet_NaN()), slope);
    }
#if defined(FASTLN_AVX512)
    return bits_as<Float>(_mm512_permutexvar_ps(bits_as<__m512i>(codes), _mm512_loadu_ps(levels_)));
#else
    Float slope;
    for (int lane = 0; lane < LANES; lane++) slope[lane] = levels_[codes[lane]];
    return slope;
#endif
  }

 private:
  float zero_ = 0, steps_ = 0, step_ = 0;
  alignas(64) float levels_[16] = {};
  alignas(64) float bounds_[32] = {};
};

}  // namespace fastln
