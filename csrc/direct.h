/* Matrix products that read the weights as they lie, for calls of so few rows that packing would cost more. */

#ifndef LONGSHORT_DIRECT_H
#define LONGSHORT_DIRECT_H

#include "tiles.h"

namespace ls {
namespace LS_TARGET {

constexpr int kDotColumns = 4;
constexpr int kDotRows = kAccumulators / kDotColumns;

/* Lane u of the result is the sum of sum[u]'s lanes in every fourth, for kDotColumns of them. */
static inline V sums_of_fourths(const V* sum) {
  return folded<1>(folded<2>(sum[0], sum[2]), folded<2>(sum[1], sum[3]));
}

/* Of vectors of such fourths' sums, one for each kDotColumns lanes of the result, the whole sums. */
template <int kHalf = W / 2>
static inline V sums_of_wholes(V* sum) {
  if constexpr (kHalf < kDotColumns) {
    return sum[0];
  } else {
    for (int i = 0; i < kHalf / kDotColumns; ++i) sum[i] = folded<kHalf>(sum[i], sum[i + kHalf / kDotColumns]);
    return sums_of_wholes<kHalf / 2>(sum);
  }
}

/* out[r], lane u = start + sum over k of a[r][k] weight[u][k], for `units` lanes; the others are start. */
template <int R>
static void dot(int64_t K, const float* a, int64_t a_row, const float* weight, int64_t stride, int units, float* out,
                int64_t out_row) {
  V sums[R][W / kDotColumns];
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
      if (int left = int(K - k)) {
        V y[kDotColumns];
        for (int u = 0; u < kDotColumns; ++u) y[u] = load_part(w[u] + k, left);
        for (int r = 0; r < R; ++r) {
          V x = load_part(a + r * a_row + k, left);
          for (int u = 0; u < kDotColumns; ++u) sum[r][u] += x * y[u];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][u0 / kDotColumns] = sums_of_fourths(sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* to = out + r * out_row;
    store(to, load(to) + first_lanes(sums_of_wholes(sums[r]), units));
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
