/* Matrix products that read the weights as they lie, for calls of so few rows that packing would cost more. */

#ifndef LONGSHORT_DIRECT_H
#define LONGSHORT_DIRECT_H

#include "tiles.h"

namespace ls {
namespace LS_TARGET {

/* Lane u of the result is the sum of v[u]'s lanes. */
static inline V sum_lanes(V* v) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
  for (int half = W / 2; half >= 1; half /= 2) {
    VI first, second; /* of two vectors, the even and the odd pieces of `half` lanes */
    for (int lane = 0; lane < W; ++lane) {
      int piece = lane / half, even = piece & ~1, from = piece & 1 ? W : 0;
      first[lane] = from + even * half + lane % half;
      second[lane] = from + (even + 1) * half + lane % half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + half], first) + __builtin_shuffle(v[i], v[i + half], second);
  }
  return v[0];
#else
  float sums[W] = {};
  for (int u = 0; u < W; ++u)
    for (int lane = 0; lane < W; ++lane) sums[u] += v[u][lane];
  return load(sums);
#endif
}

constexpr int kDotColumns = 4;
constexpr int kDotRows = kAccumulators / kDotColumns;

/* out[r], lane u = start + sum over k of a[r][k] weight[u][k], for `units` lanes; the others are start. */
template <int R>
static void dot(int64_t K, const float* a, int64_t a_row, const float* weight, int64_t stride, int units, float* out,
                int64_t out_row) {
  V sums[R][W];
  for (int u0 = 0; u0 < W; u0 += kDotColumns) {
    V sum[R][kDotColumns];
    const float* w[kDotColumns];
    for (int u = 0; u < kDotColumns; ++u) {
      w[u] = weight + (u0 + u < units ? u0 + u : 0) * stride;
      for (int r = 0; r < R; ++r) sum[r][u] = V{};
    }
    int64_t k = 0;
    if (u0 < units) {
      for (; k + W <= K; k += W) {
        V x[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) x[r] = load(a + r * a_row + k);
#pragma GCC unroll 4
        for (int u = 0; u < kDotColumns; ++u) {
          V y = load(w[u] + k);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r][u] += x[r] * y;
        }
      }
      int left = int(K - k);
      for (int r = 0; left && r < R; ++r) {
        V x = load_part(a + r * a_row + k, left);
        for (int u = 0; u < kDotColumns; ++u) sum[r][u] += x * load_part(w[u] + k, left);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < kDotColumns; ++u) sums[r][u0 + u] = u0 + u < units ? sum[r][u] : V{};
  }
  for (int r = 0; r < R; ++r) {
    float* to = out + r * out_row;
    store(to, load(to) + sum_lanes(sums[r]));
  }
}

template <int R = kDotRows>
static inline void dot_rows(int rows, int64_t K, const float* a, int64_t a_row, const float* weight, int64_t stride, int units,
                            float* out, int64_t out_row) {
  if constexpr (R == 1) {
    dot<1>(K, a, a_row, weight, stride, units, out, out_row);
  } else {
    if (rows == R)
      dot<R>(K, a, a_row, weight, stride, units, out, out_row);
    else
      dot_rows<R - 1>(rows, K, a, a_row, weight, stride, units, out, out_row);
  }
}

/* out[r][column] += sum over j of a[r][j] weight[j][column], for `depth` <= kDepthAtOnce of j and all columns. */
constexpr int kDepthAtOnce = W < 8 ? W : 8;

template <int R>
static void add_scaled(int depth, const float* a, int64_t a_row, const float* weight, int64_t stride, int64_t columns,
                       float* const* out) {
  V s[R][kDepthAtOnce];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kDepthAtOnce; ++j) s[r][j] = splat(j < depth ? a[r * a_row + j] : 0.0f);
  const float* w[kDepthAtOnce];
  for (int j = 0; j < kDepthAtOnce; ++j) w[j] = weight + (j < depth ? j : 0) * stride;
  int64_t column = 0;
#pragma GCC unroll 2
  for (; column + W <= columns; column += W) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(out[r] + column);
#pragma GCC unroll 8
    for (int j = 0; j < kDepthAtOnce; ++j) {
      V y = load(w[j] + column);
      for (int r = 0; r < R; ++r) sum[r] += s[r][j] * y;
    }
    for (int r = 0; r < R; ++r) store(out[r] + column, sum[r]);
  }
  int left = int(columns - column);
  for (int r = 0; left && r < R; ++r) {
    V sum = load_part(out[r] + column, left);
    for (int j = 0; j < kDepthAtOnce; ++j) sum += s[r][j] * load_part(w[j] + column, left);
    store_part(out[r] + column, sum, left);
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
