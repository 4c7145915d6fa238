// Elementwise functions of float32 vectors. Their polynomials were fitted to float64 values for the least relative
// error. Those named `..._for` take the dtype of the results that they are for: 16 bits need fewer digits.
#pragma once

#include "vector.h"

namespace fastln {

// Rounds to the nearest whole number, for magnitudes below 2^22.
inline Float nearest(Float x) {
  const Float shift = broadcast(0x1.8p23f);
  return (x + shift) - shift;
}

// 2^n, for whole numbers n from -126 to 127.
inline Float power_of_two(Float n) { return bits_as<Float>((__builtin_convertvector(n, Int) + 127) << 23); }

// e^x = 2^n e^r with |r| <= log(2) / 2, and e^r = 1 + r + r^2 p(r). Accurate to one unit in the last place. Results
// that are 0, subnormal or infinite are correct too, and NaN gives NaN.
inline Float exponential(Float x) {
#if defined(FASTLN_AVX512)
  // Lanes that give 0 are left out of the last instruction, which is slow where a result underflows.
  const __mmask16 some = _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(-104), _CMP_NLT_UQ);
#else
  x = select(x < -104.0f, broadcast(-104.0f), x);
#endif
  x = select(x > 89.0f, broadcast(89.0f), x);
  const Float n = nearest(x * 1.44269504f);
  // log(2) in two parts. The first has so few digits that its product with n is exact.
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = r * 0.00138145173f + 0.00836875569f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
#if defined(FASTLN_AVX512)
  return bits_as<Float>(_mm512_maskz_scalef_ps(some, bits_as<__m512>(p), bits_as<__m512>(n)));
#else
  const Float half = nearest(n * 0.5f);
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

#if defined(FASTLN_AVX512)
// 2^x for 16 bits. The polynomial approximates 2^f for 0 <= f < 1 with relative error 2.7e-6.
inline Float power_for_16_bits(Float x) {
  const Float f = bits_as<Float>(_mm512_reduce_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  Float p = f * 0.013534165f + 0.0520114675f;
  p = p * f + 0.241442755f;
  p = p * f + 0.693003833f;
  p = p * f + 1.00000262f;
  return bits_as<Float>(_mm512_scalef_ps(bits_as<__m512>(p), bits_as<__m512>(x)));  // by 2^floor(x)
}
#endif

inline Float exponential_for(Float x, float) { return exponential(x); }
template <class T>
Float exponential_for(Float x, T) {
#if defined(FASTLN_AVX512)
  return power_for_16_bits(x * 1.44269504f);
#else
  return exponential(x);
#endif
}

// e^(-x^2 / 2).
inline Float bell_for(Float x, float) { return exponential(x * x * -0.5f); }
template <class T>
Float bell_for(Float x, T) {
#if defined(FASTLN_AVX512)
  return power_for_16_bits(x * x * -0.721347520f);
#else
  return bell_for(x, float{});
#endif
}

// 1 / x; for 16 bits with relative error 6.1e-5.
inline Float inverse_for(Float x, float) { return 1.0f / x; }
template <class T>
Float inverse_for(Float x, T) {
#if defined(FASTLN_AVX512)
  return bits_as<Float>(_mm512_rcp14_ps(bits_as<__m512>(x)));
#else
  return 1.0f / x;
#endif
}

struct Shares {
  Float part, rest;  // they sum to 1; in float32 both are accurate to a few units in their last place
};

// The logistic function of x and of -x.
template <class T>
Shares logistic_for(Float x, T type) {
  Float e = exponential_for(-x, type);
  const Float part = inverse_for(1.0f + e, type);
  e = select(e > 3e38f, broadcast(3e38f), e);  // infinity times 0 would be NaN
  return {part, part * e};
}

// The normal distribution function at x, given bell = e^(-x^2 / 2). At -|x| it is bell t p(t) with t = 1 / (1 + c |x|).
// This is the form of Hastings' approximation 7.1.26 in Abramowitz and Stegun.
template <class Below>
Float normal_share(Float x, Float bell, const Below& below) {
  const Float at_minus = bell * below(bits_as<Float>(bits_as<UInt>(x) & 0x7FFFFFFFu));
  return select(x < 0.0f, at_minus, 1.0f - at_minus);
}

// A p of degree 8, whose relative error is 3.2e-8.
inline Float normal_share_for(Float x, Float bell, float) {
  return normal_share(x, bell, [](Float magnitude) {
    const Float t = 1.0f / (1.0f + 0.35f * magnitude);
    Float p = t * -0.0291459393f + 0.143971741f;
    p = p * t + -0.255714357f;
    p = p * t + 0.159174263f;
    p = p * t + -0.0231099054f;
    p = p * t + 0.105508037f;
    p = p * t + 0.119832858f;
    p = p * t + 0.139861867f;
    p = p * t + 0.139621407f;
    return p * t;
  });
}

// A p of degree 4, whose relative error is 3.1e-5.
template <class T>
Float normal_share_for(Float x, Float bell, T type) {
  return normal_share(x, bell, [&](Float magnitude) {
    const Float t = inverse_for(1.0f + 0.375f * magnitude, type);
    Float p = t * -0.0906427503f + 0.200281516f;
    p = p * t + 0.0835641697f;
    p = p * t + 0.157733947f;
    p = p * t + 0.149061024f;
    return p * t;
  });
}

}  // namespace fastln
