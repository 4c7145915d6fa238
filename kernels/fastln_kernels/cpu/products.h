// Matrix products of blocks in the cache, and the memory layouts that their operands need. The products are the
// function of torch that its own CPU kernels call: oneDNN's kernels for this processor's matrix or vector units, with
// float32 results.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "transpose.h"

namespace fastln {

// at::native::cpublas::brgemm and brgemm_release.
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                         const void* a, const void* b, float* c, bool paired);
// The same in 8 bits: whole numbers 0 to 255 times -128 to 127, exact sums. The second operand stores four neighbouring
// rows interleaved.
using Product8 = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const uint8_t* a, const int8_t* b, int32_t* c, bool interleaved);
using Release = void (*)(bool paired);

// A product that does not work on this processor is null.
struct Products {
  Product bfloat16, float32;
  Product8 int8;
  Release release;
};

inline Products products;

// In bfloat16 the second operand of a product stores pairs: two neighbouring rows, interleaved.
template <class C>
constexpr bool PAIRED = std::is_same_v<C, bfloat16>;

// c (m, n) = a (m, k) b (k, n), added to c if `add`. m, n and k are multiples of PAD.
template <class C>
inline void multiply(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, float* c,
                     int64_t ldc, bool add) {
  (PAIRED<C> ? products.bfloat16 : products.float32)(m, n, k, lda, ldb, ldc, add, a, b, c, PAIRED<C>);
}

// Resets the matrix unit to the state that the thread found.
template <class C>
inline void release() {
  products.release(PAIRED<C>);
}

// Whether products work, tested with ones times twos.
template <class C>
bool works() {
  constexpr int64_t SIZE = 32;
  alignas(64) C a[SIZE * SIZE], b[SIZE * SIZE];
  alignas(64) float c[SIZE * SIZE];
  for (int64_t i = 0; i < SIZE * SIZE; i += LANES) {
    store(a + i, broadcast(1.0f), AllLanes{});
    store(b + i, broadcast(2.0f), AllLanes{});
  }
  try {
    multiply(SIZE, SIZE, SIZE, a, SIZE, b, SIZE, c, SIZE, false);
    release<C>();
  } catch (...) {
    return false;  // torch throws if this processor has no such product
  }
  return std::all_of(c, c + SIZE * SIZE, [](float value) { return value == 2.0f * SIZE; });
}

// Whether products in 8 bits work, and hold the largest sums: units that add pairs in 16 bits would not.
inline bool works_in_8_bits() {
  constexpr int64_t SIZE = 64;
  alignas(64) uint8_t a[SIZE * SIZE];
  alignas(64) int8_t b[SIZE * SIZE];
  alignas(64) int32_t c[SIZE * SIZE];
  std::memset(a, 255, sizeof(a));
  std::memset(b, 127, sizeof(b));
  try {
    products.int8(SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, false, a, b, c, true);
    products.release(true);
  } catch (...) {
    return false;  // torch throws if this processor has no such product
  }
  return std::all_of(c, c + SIZE * SIZE, [](int32_t value) { return value == 255 * 127 * SIZE; });
}

// Stores vectors of two rows in the layout of rows 2i and 2i + 1 of a second operand.
inline void store_pair(float* to, int64_t ld, Float even, Float odd) {
  store(to, even, AllLanes{});
  store(to + ld, odd, AllLanes{});
}
inline void store_pair(bfloat16* to, int64_t, Float even, Float odd) {
  const UInt pair = widen(from_float(even, bfloat16{})) | (widen(from_float(odd, bfloat16{})) << 16);
  std::memcpy(to, &pair, sizeof(pair));
}

// The address of rows 2i and 2i + 1 of a second operand, at column `column`.
template <class C>
inline C* pair_at(C* operand, int64_t ld, int64_t i, int64_t column) {
  return operand + 2 * i * ld + (PAIRED<C> ? 2 * column : column);
}

// Interleaves the numbers of two rows of `LANES` columns.
template <class T, class C>
inline void pair_columns(const T* even, const T* odd, C* to, int64_t ld) {
#if defined(FASTLN_AVX512)
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<C, bfloat16>) {
    const auto lanes = [](const T* row) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    };
    return _mm512_storeu_si512(to, _mm512_or_si512(lanes(even), _mm512_slli_epi32(lanes(odd), 16)));
  }
#endif
  store_pair(to, ld, load(even, AllLanes{}), load(odd, AllLanes{}));
}

// Copies `n_rows` rows of `n_cols` into a second operand and fills the rest with zeros.
template <class T, class C>
void pair_rows(const T* rows, int64_t stride, int64_t n_rows, int64_t n_cols, C* to, int64_t ld) {
  for (int64_t row = 0; row < padded(n_rows); row += 2) {
    const T* from = rows + row * stride;
    for (int64_t column = 0; column < padded(n_cols); column += LANES) {
      const SomeLanes lanes{static_cast<int>(std::clamp<int64_t>(n_cols - column, 0, LANES))};
      C* pair = pair_at(to, ld, row / 2, column);
      if (row + 1 < n_rows && lanes.count == LANES) {
        __builtin_prefetch(from + AHEAD * stride + column);
        __builtin_prefetch(from + (AHEAD + 1) * stride + column);
        pair_columns(from + column, from + stride + column, pair, ld);
      } else {
        store_pair(pair, ld, row < n_rows ? load(from + column, lanes) : Float{},
                   row + 1 < n_rows ? load(from + stride + column, lanes) : Float{});
      }
    }
  }
}

// Transposes the first operand (n_rows, n_cols) of `copy_rows` into a second operand. `n_cols` is a multiple of 2 PAD.
template <class C>
void transpose_to_pairs(const C* from, int64_t n_rows, int64_t n_cols, C* to, int64_t ld) {
  const int64_t words = n_cols * sizeof(C) / 4;  // a pair is one word
  transpose_words(reinterpret_cast<const uint32_t*>(from), words, padded(n_rows), words, reinterpret_cast<uint32_t*>(to),
                  ld);
}

// Converts a second operand (n_rows, n_cols), both multiples of PAD, into a first operand.
inline void split_pairs(const bfloat16* pairs, int64_t ld, int64_t n_rows, int64_t n_cols, bfloat16* to) {
  for (int64_t row = 0; row < n_rows; row += 2) {
    for (int64_t column = 0; column < n_cols; column += LANES) {
      UInt both;
      std::memcpy(&both, pairs + row * ld + 2 * column, sizeof(both));
      const UShort even = narrow(both & 0xFFFF), odd = narrow(both >> 16);
      std::memcpy(to + row * ld + column, &even, sizeof(even));
      std::memcpy(to + (row + 1) * ld + column, &odd, sizeof(odd));
    }
  }
}

}  // namespace fastln

// Receives torch's functions, and sets for each dtype of dispatch.h whether its product works on this processor.
extern "C" void fastln_take_products(void* bfloat16_product, void* float32_product, void* int8_product, void* release,
                                     int64_t* usable) {
  using namespace fastln;
  products = {reinterpret_cast<Product>(bfloat16_product), reinterpret_cast<Product>(float32_product),
              reinterpret_cast<Product8>(int8_product), reinterpret_cast<Release>(release)};
  if (!works<bfloat16>()) products.bfloat16 = nullptr;
  if (!works<float>()) products.float32 = nullptr;
  if (!products.int8 || !works_in_8_bits()) products.int8 = nullptr;
  usable[FLOAT32] = products.float32 != nullptr;
  usable[BFLOAT16] = products.bfloat16 != nullptr;
  usable[INT8] = products.int8 != nullptr;
}
