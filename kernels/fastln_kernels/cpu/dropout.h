// Dropout's random numbers. fastln_kernels.reference.dropout_keep defines which number belongs to which element.
#pragma once

#include "parallel.h"
#include "vector.h"

namespace fastln {

constexpr int PHILOX_ROUNDS = 10;
constexpr int PLACES = 4;  // rows of numbers that a thread can hold at once
constexpr int LONG_LANES = LANES / 2;
constexpr int NUMBERS_A_DRAW = 8 * LONG_LANES;

// The full products of the low halves of 64-bit lanes.
inline ULong multiply_low(ULong a, ULong b) {
#if defined(FASTLN_AVX512)
  return bits_as<ULong>(_mm512_mul_epu32(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<ULong>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif defined(__SSE2__)
  return bits_as<ULong>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

inline ULong exclusive_or(ULong a, ULong b, ULong c) {
#if defined(FASTLN_AVX512)
  return bits_as<ULong>(_mm512_ternarylogic_epi64(bits_as<__m512i>(a), bits_as<__m512i>(b), bits_as<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// The even (or odd) lanes of a and b, interleaved.
inline ULong interleave_even(ULong a, ULong b) {
#if defined(FASTLN_AVX512)
  return bits_as<ULong>(_mm512_unpacklo_epi64(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<ULong>(_mm256_unpacklo_epi64(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  return ULong{a[0], b[0]};
#endif
}
inline ULong interleave_odd(ULong a, ULong b) {
#if defined(FASTLN_AVX512)
  return bits_as<ULong>(_mm512_unpackhi_epi64(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<ULong>(_mm256_unpackhi_epi64(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  return ULong{a[1], b[1]};
#endif
}

class Dropout {
 public:
  // Drops `threshold` of 65,536 elements. 0 means no dropout; then `seed` may be null.
  Dropout(int64_t threshold, const int64_t* seed) : threshold_(static_cast<uint32_t>(threshold)) {
    scale_ = 65536.0f / (65536.0f - static_cast<float>(threshold));
    if (!threshold) return;
    uint32_t low = static_cast<uint32_t>(*seed), high = static_cast<uint32_t>(static_cast<uint64_t>(*seed) >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
      keys_[round][0] = low;
      keys_[round][1] = high;
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
  }

  bool active() const { return threshold_ != 0; }

  // Returns the 16-bit numbers of a row's elements. They are valid until the thread's next call with the same `place`.
  // A 64-bit lane holds one 32-bit word of a counter. Its upper half may hold anything, because the products read only
  // the low halves.
  const uint16_t* draw(int64_t row, int64_t n_cols, int place, int64_t first = 0) const {
    thread_local Buffer<uint16_t> buffers[PLACES];
    uint16_t* numbers = buffers[place].at_least(n_cols + NUMBERS_A_DRAW);
    ULong groups{};
    for (int lane = 0; lane < LONG_LANES; lane++) groups[lane] = first / 8 + lane / 2 + lane % 2 * (LONG_LANES / 2);
    for (int64_t column = 0; column < n_cols; column += NUMBERS_A_DRAW, groups += LONG_LANES) {
      ULong c0 = groups, c1 = ULong{} + static_cast<uint64_t>(row), c2 = c1 >> 32, c3{};
#pragma GCC unroll 10
      for (int round = 0; round < PHILOX_ROUNDS; round++) {
        const ULong p0 = multiply_low(c0, ULong{} + 0xD2511F53), p2 = multiply_low(c2, ULong{} + 0xCD9E8D57);
        c0 = exclusive_or(p2 >> 32, c1, ULong{} + keys_[round][0]);
        c2 = exclusive_or(p0 >> 32, c3, ULong{} + keys_[round][1]);
        c1 = p2;
        c3 = p0;
      }
      const ULong first = (c0 & 0xFFFFFFFF) | (c1 << 32), second = (c2 & 0xFFFFFFFF) | (c3 << 32);
      const ULong even = interleave_even(first, second), odd = interleave_odd(first, second);
      std::memcpy(numbers + column, &even, sizeof(even));
      std::memcpy(numbers + column + NUMBERS_A_DRAW / 2, &odd, sizeof(odd));
    }
    return numbers;
  }

  float scale() const { return scale_; }

  // Returns the kept elements of `value`, and 0 for the others.
  Float keep(Float value, const uint16_t* numbers) const {
    UShort bits;
    std::memcpy(&bits, numbers, sizeof(bits));
    return select(widen(bits) >= threshold_, value, Float{});
  }

  // Returns the kept elements of `value`, scaled, and 0 for the others, even if those are NaN or infinite.
  Float apply(Float value, const uint16_t* numbers) const {
    UShort bits;
    std::memcpy(&bits, numbers, sizeof(bits));
    return select(widen(bits) >= threshold_, value * broadcast(scale_), Float{});
  }

 private:
  uint32_t threshold_;
  float scale_;
  uint64_t keys_[PHILOX_ROUNDS][2] = {};
};

}  // namespace fastln
