/* Weights of eight bits: a quarter of the memory to read, which is what one text alone waits for.

   Each column of a panel has a scale, the largest of its weights / 127, and its weights are rounded to multiples of it. h, the
   sums and everything else stay float32: out = start + scale * sum over k of h[k] q[k]. */

#ifndef LONGSHORT_BYTES_H
#define LONGSHORT_BYTES_H

#include "tiles.h"

namespace ls {
namespace LS_TARGET {

static inline V load(const int8_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  VI v; /* the general conversion of GCC goes by way of memory */
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return __builtin_convertvector(v, V);
#endif
}

/* As `multiply`, of a panel of bytes with N W scales. */
template <int R, int N>
static void multiply_bytes(int64_t k_blocks, const float* a, int64_t a_block, const int8_t* panel, const float* scales,
                           const Place& start, const Place& out) {
  V sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = V{};
  for (int64_t block = 0; block < k_blocks; ++block) {
#pragma GCC unroll 4
    for (int k = 0; k < W; ++k) {
      V w[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) w[n] = load(panel + (k * N + n) * W);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        V s = splat(a[r * W + k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] += s * w[n];
      }
    }
    a += a_block;
    panel += W * N * W;
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      store(out.p + r * out.row + n * out.vector,
            load(start.p + r * start.row + n * start.vector) + sum[r][n] * load(scales + n * W));
}

template <int N, int R = kAccumulators / N>
static inline void multiply_bytes_rows(int rows, int64_t k_blocks, const float* a, int64_t a_block, const int8_t* panel,
                                       const float* scales, const Place& start, const Place& out) {
  if constexpr (R == 1) {
    multiply_bytes<1, N>(k_blocks, a, a_block, panel, scales, start, out);
  } else {
    if (rows == R)
      multiply_bytes<R, N>(k_blocks, a, a_block, panel, scales, start, out);
    else
      multiply_bytes_rows<N, R - 1>(rows, k_blocks, a, a_block, panel, scales, start, out);
  }
}

/* What a panel [K][columns] of floats takes as scales and bytes, counted in floats. K is a multiple of W. */
static inline int64_t bytes_floats(int64_t K, int64_t columns) { return columns + ceil_div(K * columns, 4); }

/* Scales, then bytes. */
static inline void round_to_bytes(const float* panel, int64_t K, int64_t columns, float* out) {
  int8_t* bytes = reinterpret_cast<int8_t*>(out + columns);
  for (int64_t column = 0; column < columns; ++column) {
    float largest = 0.0f;
    for (int64_t k = 0; k < K; ++k) {
      float size = __builtin_fabsf(Step::of_panel(panel, columns, k, column));
      largest = size > largest ? size : largest;
    }
    float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    out[column] = scale;
    for (int64_t k = 0; k < K; ++k) {
      float q = Step::of_panel(panel, columns, k, column) * inverse;
      q = q < -127.0f ? -127.0f : q < 127.0f ? q : 127.0f; /* where a weight is not finite too */
      bytes[k * columns + column] = int8_t(q < 0.0f ? q - 0.5f : q + 0.5f);
    }
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
