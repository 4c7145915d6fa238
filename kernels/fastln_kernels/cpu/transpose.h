// Transposes, which give matrix products the memory layouts that their operands need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vector.h"

namespace fastln {

constexpr int64_t PAD = 16;  // block sizes are multiples of this, because every distinct shape needs its own kernel

inline int64_t padded(int64_t size) { return (size + PAD - 1) / PAD * PAD; }

constexpr int64_t AHEAD = 16;  // rows are too far apart for the processor's own prefetchers

template <class T, bool TO_WRITE = false>
inline void prefetch_row(const T* row, int64_t n_cols) {
  for (int64_t column = 0; column < n_cols; column += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + column, TO_WRITE);
}

#if defined(FASTLN_AVX512)
// Transposes 16 x 16 words, of rows `stride` bytes apart: calls `take(i, column)` with each column.
template <class Take>
inline __attribute__((always_inline)) void transpose_16(const void* from, int64_t stride, const Take& take) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; part++) {
    const auto words = [&](int row) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + row * stride) + part);
    };
    __m512i rows[4];  // four words of rows i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      rows[i] = _mm512_castsi128_si512(words(i));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x00F0, words(i + 4));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x0F00, words(i + 8));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0xF000, words(i + 12));
    }
    const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]), high = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i more_low = _mm512_unpacklo_epi32(rows[2], rows[3]), more_high = _mm512_unpackhi_epi32(rows[2], rows[3]);
    take(4 * part, _mm512_unpacklo_epi64(low, more_low));
    take(4 * part + 1, _mm512_unpackhi_epi64(low, more_low));
    take(4 * part + 2, _mm512_unpacklo_epi64(high, more_high));
    take(4 * part + 3, _mm512_unpackhi_epi64(high, more_high));
  }
}
#endif

// Transposes (n_rows, n_cols) 32-bit words. `n_rows` is a multiple of PAD. If COLD, the rows are not in a cache.
template <bool COLD = false>
inline void transpose_words(const uint32_t* from, int64_t from_ld, int64_t n_rows, int64_t n_cols, uint32_t* to,
                            int64_t to_ld) {
  int64_t done = 0;
#if defined(FASTLN_AVX512)
  done = n_cols / 16 * 16;
  for (int64_t row = 0; row < n_rows; row += 16) {
    for (int64_t column = 0; column < done; column += 16) {
      if (COLD)
        for (int i = 0; i < 16; i++) __builtin_prefetch(from + (row + 16 + i) * from_ld + column);
      transpose_16(from + row * from_ld + column, 4 * from_ld, [&](int i, __m512i words) __attribute__((always_inline)) {
        _mm512_storeu_si512(to + (column + i) * to_ld + row, words);
      });
    }
  }
#endif
  for (int64_t row = 0; row < n_rows; row++)
    for (int64_t column = done; column < n_cols; column++)  // a pair of 16-bit numbers may not be aligned like a word
      std::memcpy(to + column * to_ld + row, from + row * from_ld + column, sizeof(uint32_t));
}

// Copies `n_rows` rows of `n_cols` into a first operand (padded, ld) and fills the rest with zeros. `ld` is a multiple
// of PAD.
template <class T, class C>
void copy_rows(const T* rows, int64_t stride, int64_t n_rows, int64_t n_cols, C* to, int64_t ld) {
  for (int64_t row = 0; row < n_rows; row++, to += ld) {
    prefetch_row(rows + (row + AHEAD) * stride, n_cols);
    if constexpr (std::is_same_v<T, C> && sizeof(T) == 2) {
      std::memcpy(static_cast<void*>(to), rows + row * stride, n_cols * sizeof(T));
      if (n_cols < ld) std::memset(static_cast<void*>(to + n_cols), 0, (ld - n_cols) * sizeof(C));
    } else {
      for_columns(n_cols, [&](int64_t column, auto lanes) {
        store(to + column, load(rows + row * stride + column, lanes), AllLanes{});
      });
      for (int64_t column = (n_cols + LANES - 1) / LANES * LANES; column < ld; column += LANES)
        store(to + column, Float{}, AllLanes{});
    }
  }
  std::memset(static_cast<void*>(to), 0, (padded(n_rows) - n_rows) * ld * sizeof(C));
}

// Transposes `n_rows` rows of `n_cols` into floats (width, ld), and fills up to padded(n_rows) with zeros. `width` is a
// multiple of 2 PAD; `work` holds PAD rows of `width`.
template <class T>
void transpose_rows(const T* rows, int64_t stride, int64_t n_rows, int64_t n_cols, int64_t width, float* work, float* to,
                    int64_t ld) {
  for (int64_t row = 0; row < n_rows; row += PAD) {
    const T* from = rows + row * stride;
#if defined(FASTLN_AVX512)
    if constexpr (!std::is_same_v<T, float16>) {
      if (row + PAD <= n_rows && n_cols == width) {
        for (int64_t i = 0; i < PAD; i++) prefetch_row(from + (i + AHEAD) * stride, n_cols);
        constexpr int A_WORD = 4 / sizeof(T);
        for (int64_t column = 0; column < width; column += PAD * A_WORD) {
          transpose_16(from + column, stride * sizeof(T), [&](int i, __m512i words) __attribute__((always_inline)) {
            float* result = to + (column + i * A_WORD) * ld + row;
            if constexpr (A_WORD == 1) {
              _mm512_storeu_si512(result, words);
            } else {  // a pair of numbers, whose bits are the upper halves of floats
              _mm512_storeu_si512(result, _mm512_slli_epi32(words, 16));
              _mm512_storeu_si512(result + ld, _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
            }
          });
        }
        continue;
      }
    }
#endif
    copy_rows(from, stride, std::min(PAD, n_rows - row), n_cols, work, width);
    transpose_words(reinterpret_cast<const uint32_t*>(work), width, PAD, width, reinterpret_cast<uint32_t*>(to + row), ld);
  }
}

// Writes the transpose of `from` (n_cols, ld), times `factor`, to rows. Both sizes of `from` are multiples of PAD.
template <class T>
void store_transposed(const float* from, int64_t ld, int64_t n_rows, int64_t n_cols, float factor, T* to, int64_t stride) {
  for (int64_t row = 0; row < n_rows; row += PAD) {
    const int64_t size = std::min(PAD, n_rows - row);
    for (int64_t i = 0; i < PAD; i++) prefetch_row<T, true>(to + (row + i + AHEAD) * stride, n_cols);
    for_columns(n_cols, [&](int64_t column, auto lanes) {
      const float* block = from + column * ld + row;
      T* result = to + row * stride + column;
#if defined(FASTLN_AVX512)
      transpose_16(block, ld * sizeof(float), [&](int i, __m512i words) __attribute__((always_inline)) {
        if (i < size) store(result + i * stride, bits_as<Float>(words) * factor, lanes);
      });
#else
      for (int64_t i = 0; i < size; i++) {
        Float values;
        for (int lane = 0; lane < LANES; lane++) values[lane] = block[lane * ld + i];
        store(result + i * stride, values * factor, lanes);
      }
#endif
    });
  }
}

}  // namespace fastln
