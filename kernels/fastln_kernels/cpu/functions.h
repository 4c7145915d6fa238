// Elementwise functions of float32 vectors. Their polynomials were fitted to float64 values for the least relative
// error.
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
  x = select(x < -104.0f, broadcast(-104.0f), x);
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
  return bits_as<Float>(_mm512_scalef_ps(bits_as<__m512>(p), bits_as<__m512>(n)));
#else
  const Float half = nearest(n * 0.5f);
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

struct Shares {
  Float part, rest;  // they sum to 1; both are accurate to a few units in their last place
};

// The logistic function of x and of -x.
inline Shares logistic(Float x) {
  Float e = exponential(-x);
  const Float part = 1.0f / (1.0f + e);
  e = select(e > 3e38f, broadcast(3e38f), e);  // infinity times 0 would be NaN
  return {part, part * e};
}

// The normal distribution function at x, given bell = e^(-x^2 / 2). At -|x| it is bell t p(t) with t = 1 / (1 + 0.35
// |x|). This is the form of Hastings' approximation 7.1.26 in Abramowitz and Stegun, with a p of degree 8 whose
// relative error is 3.2e-8.
inline Float normal_share(Float x, Float bell) {
  const Float magnitude = select(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.35f * magnitude);
  Float p = t * -0.0291459393f + 0.143971741f;
  p = p * t + -0.255714357f;
  p = p * t + 0.159174263f;
  p = p * t + -0.0231099054f;
  p = p * t + 0.105508037f;
  p = p * t + 0.119832858f;
  p = p * t + 0.139861867f;
  p = p * t + 0.139621407f;
  const Float below = bell * (p * t);
  return select(x < 0.0f, below, 1.0f - below);
}

}  // namespace fastln
