/* exp, tanh, sigmoid: within 4 ULP where the exact result is a normal number, else within 2^-126. NaN stays NaN.

   All three stand on e^r - 1 = r + r^2 q(r) for |r| <= ln 2 / 2, where q has degree 4 (relative error 1.4e-8, a fifth of
   an ULP; least squares, reweighted until the error was even), and on x = n ln 2 + r. */

#ifndef LONGSHORT_ACTIVATIONS_H
#define LONGSHORT_ACTIVATIONS_H

#include "vector.h"

namespace ls {
namespace LS_TARGET {

/* x = n ln 2 + r; gives e^r - 1 and n. |x| must be below 2^20. */
static inline V expm1_reduced(V x, VI* n) {
  const float kRound = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
  V shifted = x * 1.44269504f + kRound;
  VI bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  *n = bits - 0x4B400000;
  V whole = shifted - kRound;
  /* ln 2 in two parts, the first of so few bits that whole * 0.693359375 is exact. */
  V r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  V q = r * 1.3882517e-3f + 8.3665475e-3f;
  q = q * r + 4.1667200e-2f;
  q = q * r + 1.6666543e-1f;
  q = q * r + 4.9999997e-1f;
  return r + (r * r) * q;
}

/* 2^n for n in -126..127. */
static inline V power_of_two(VI n) {
  VI bits = (n + 127) << 23;
  V v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

/* 1 / x for x in 1..2^60. */
static inline V reciprocal(V x) {
#if defined(__AVX512F__)
  /* 14 bits and one step of Newton's method: a third of the time of a division. */
  V y = (V)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

static inline V absolute(V x) {
  VI bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits &= 0x7FFFFFFF;
  V v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

static inline V exponential(V x) {
  V clamped = x > 89.0f ? splat(89.0f) : x; /* beyond, infinity; a comparison with NaN is false, so NaN passes */
  clamped = clamped < -104.0f ? splat(-104.0f) : clamped;
  VI n;
  V m = expm1_reduced(clamped, &n);
  VI half = n >> 1; /* in two steps, since 2^n may lie outside the normal numbers where the result does not */
  return ((1.0f + m) * power_of_two(half)) * power_of_two(n - half);
}

/* e^-|x|, for sigmoid: 0 where it is subnormal. */
static inline V exp_minus(V magnitude) {
  V clamped = magnitude > 87.5f ? splat(87.5f) : magnitude;
  VI n;
  V m = expm1_reduced(-clamped, &n);
  return (1.0f + m) * power_of_two(n);
}

static inline V sigmoid(V x) {
  /* 1 / (1 + e^-x), and e^x / (1 + e^x) below 0: the denominator stays in 1..2. */
  V e = exp_minus(absolute(x));
  V y = reciprocal(1.0f + e);
  return x < 0.0f ? e * y : y;
}

static inline V tanh(V x) {
  /* (e^2x - 1) / (e^2x + 1); from 9.02 on the nearest float is 1. */
  V clamped = x > 9.1f ? splat(9.1f) : x;
  clamped = clamped < -9.1f ? splat(-9.1f) : clamped;
  VI n;
  V m = expm1_reduced(clamped + clamped, &n);
  V p = power_of_two(n);
  V d = p * m + (p - 1.0f);
  return d * reciprocal(d + 2.0f);
}

static inline V relu(V x) { return x < 0.0f ? V{} : x; }

}  // namespace LS_TARGET
}  // namespace ls

#endif
