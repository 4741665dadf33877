/* Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450): (x - mean) / sqrt(variance + 1e-5) over a row. */

#ifndef LONGSHORT_NORMAL_H
#define LONGSHORT_NORMAL_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

struct Moments {
  float mean, scale; /* scale: 1 / sqrt(variance + 1e-5) */
  V normalise(V x) const { return (x - mean) * scale; }
};

/* Of one row whose unit blocks lie in groups of M vectors, `apart` floats from group to group: of the gates as a panel holds
   them, or of a state. Padding does not count. In two passes, since the difference of two large sums would lose the
   variance; both in one order, whatever the number of threads. */
template <class Cell, int M>
static inline Moments moments(const Sizes<Cell>& sizes, const float* row, int64_t apart) {
  const int64_t whole = sizes.H / (W * Cell::kUnits);
  const float count = float(M / Cell::kUnits * sizes.H);
  V sum[M] = {};
  for (int64_t group = 0; group < whole; ++group)
    for (int n = 0; n < M; ++n) sum[n] += load(row + group * apart + n * W);
  for (int64_t group = whole; group < sizes.panels; ++group)
    for (int n = 0; n < M; ++n)
      sum[n] += first_lanes(load(row + group * apart + n * W), sizes.units(group * Cell::kUnits + n % Cell::kUnits));
  for (int n = 1; n < M; ++n) sum[0] += sum[n];
  const float mean = sum_lanes(sum[0]) / count;
  V square[M] = {};
  for (int64_t group = 0; group < whole; ++group)
    for (int n = 0; n < M; ++n) {
      V d = load(row + group * apart + n * W) - mean;
      square[n] += d * d;
    }
  for (int64_t group = whole; group < sizes.panels; ++group)
    for (int n = 0; n < M; ++n) {
      V d = load(row + group * apart + n * W) - mean;
      square[n] += first_lanes(d * d, sizes.units(group * Cell::kUnits + n % Cell::kUnits));
    }
  for (int n = 1; n < M; ++n) square[0] += square[n];
  return {mean, 1.0f / __builtin_sqrtf(sum_lanes(square[0]) / count + 1e-5f)};
}

/* The gradient that reaches x through x_hat = (x - mean) scale, from d that reaches x_hat: scale (d - mean of d - x_hat times
   the mean of d x_hat). The row's d are added one after the other, then it is closed, then it gives what reaches x. */
struct Through {
  V sum{}, product{};
  float mean, slope, scale;
  void add(V d, V x_hat) {
    sum += d;
    product += d * x_hat;
  }
  void close(int64_t count, float by) {
    mean = sum_lanes(sum) / float(count);
    slope = sum_lanes(product) / float(count);
    scale = by;
  }
  V operator()(V d, V x_hat) const { return (d - mean - x_hat * slope) * scale; }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
