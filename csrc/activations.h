/* exp, tanh, sigmoid: within 4 ULP where the exact result is a normal number, else within 2^-126. NaN stays NaN.

   All three stand on e^r - 1 = r + r^2 q(r) for |r| <= ln 2 / 2, where q has degree 4 (relative error 1.4e-8, a fifth of
   an ULP; least squares, reweighted until the error was even), and on x = n ln 2 + r. */

#ifndef LONGSHORT_ACTIVATIONS_H
#define LONGSHORT_ACTIVATIONS_H

#include "vector.h"

namespace ls {
namespace LS_TARGET {

/* x = n ln 2 + r, for |x| below 2^20. */
struct Reduced {
  V whole;     /* n */
  V shifted;   /* n in the low bits, above those of 1.5 * 2^23 */
  V r, q;      /* e^r = 1 + r + r^2 q */
};

static inline Reduced reduce(V x) {
  const float kRound = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
  Reduced v;
  v.shifted = x * 1.44269504f + kRound;
  v.whole = v.shifted - kRound;
  /* ln 2 in two parts, the first of so few bits that whole * 0.693359375 is exact. */
  v.r = x - v.whole * 0.693359375f;
  v.r = v.r + v.whole * 2.12194440e-4f;
  v.q = v.r * 1.3882517e-3f + 8.3665475e-3f;
  v.q = v.q * v.r + 4.1667200e-2f;
  v.q = v.q * v.r + 1.6666543e-1f;
  v.q = v.q * v.r + 4.9999997e-1f;
  return v;
}

/* 2^n for n in -126..127. */
static inline V power_of_two(V shifted) {
  VI bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4B400000 - 127)) << 23;
  V v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

/* 1 / x for x in 1..2^127. */
static inline V reciprocal(V x) {
#if defined(__AVX512F__)
  /* 14 bits and one step of Newton's method: a third of the time of a division. */
  V y = (V)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

/* x in -87..88.8; beyond, the nearest of what these give, but 0 for a result that is subnormal. */
static inline V exponential(V x) {
  Reduced v = reduce(at_least(at_most(x, 89.0f), -104.0f));
  V e = (v.q * v.r + 1.0f) * v.r + 1.0f;
#if defined(__AVX512F__)
  return (V)_mm512_maskz_scalef_ps(0xFFFF, (__m512)e, (__m512)v.whole);
#else
  V half = v.whole * 0.5f + 12582912.0f; /* in two steps, since 2^n may lie outside the normal numbers */
  V rest = v.whole - (half - 12582912.0f) + 12582912.0f;
  return (e * power_of_two(half)) * power_of_two(rest);
#endif
}

static inline V sigmoid(V x) {
  /* 1 / (1 + e^-x). Below -87.4 that is subnormal; above 87 it is 1. */
  Reduced v = reduce(at_most(at_least(-x, -87.0f), 87.4f));
  V e = (v.q * v.r + 1.0f) * v.r + 1.0f;
#if defined(__AVX512F__)
  e = (V)_mm512_maskz_scalef_ps(0xFFFF, (__m512)e, (__m512)v.whole);
#else
  e *= power_of_two(v.shifted);
#endif
  return reciprocal(1.0f + e);
}

static inline V tanh(V x) {
  /* (e^2x - 1) / (e^2x + 1); from 9.02 on the nearest float is 1. */
  x = at_least(at_most(x, 9.1f), -9.1f);
  Reduced v = reduce(x + x);
  V m = (v.r * v.r) * v.q + v.r; /* e^r - 1, whose digits count where x is small */
  V p = power_of_two(v.shifted);
  V d = p * m + (p - 1.0f);
  return d * reciprocal(d + 2.0f);
}

typedef double VD __attribute__((vector_size(W * 4)));
typedef int64_t VL __attribute__((vector_size(W * 4)));

/* x at most 0, in double: within 2 ULP, of x below -708 0. The series of e^r to its thirteenth power has less than 1e-17 beyond. */
static inline VD exponential(VD x) {
  const double kRound = 0x1.8p52;
  const VD bounded = x > -708.0 ? x : VD{} - 708.0;
  const VD shifted = bounded * 1.4426950408889634 + kRound, whole = shifted - kRound;
  const VD r = (bounded - whole * 0x1.62e42fee00000p-1) - whole * 0x1.a39ef35793c76p-33;
  constexpr double kFactors[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0, 1.0};
  VD e = VD{} + 1.0 / 6227020800.0;
#pragma GCC unroll 13
  for (double factor : kFactors) e = e * r + factor;
  e *= (VD)(((VL)shifted - (0x4338000000000000 - 1023)) << 52);
  return x > -708.0 ? e : x == x ? VD{} : x;
}

/* out[i] = e^((x[i] - largest) / temperature), in double; no x is above `largest`. */
static inline void exponentials(const float* x, int64_t n, double largest, double temperature, double* out) {
  typedef float Half __attribute__((vector_size(W * 2)));
  constexpr int D = W / 2;
  for (int64_t i = 0; i < n; i += W) {
    const int count = int(smaller(n - i, W));
    const V v = load_part(x + i, count);
    double found[W];
    for (int half = 0; half < 2; ++half) {
      Half part;
      __builtin_memcpy(&part, reinterpret_cast<const float*>(&v) + half * D, sizeof part);
      const VD e = exponential((__builtin_convertvector(part, VD) - largest) / temperature);
      __builtin_memcpy(found + half * D, &e, sizeof e);
    }
    __builtin_memcpy(out + i, found, size_t(count) * sizeof(double));
  }
}

/* NaN only where x[0] is. */
static inline float largest_of(const float* x, int64_t n) {
  V most = splat(x[0]);
  for (int64_t i = 0; i < n; i += W) {
    const V v = first_lanes(load_part(x + i, int(smaller(n - i, W))), int(smaller(n - i, W)), most);
    most = v > most ? v : most;
  }
  float largest = x[0];
  for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

static inline V relu(V x) { return x < 0.0f ? V{} : x; }

}  // namespace LS_TARGET
}  // namespace ls

#endif
