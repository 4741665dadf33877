/* The logarithm of a sum of exponentials, and the loss of an output layer with its gradient. */

#ifndef LONGSHORT_LOSS_H
#define LONGSHORT_LOSS_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

/* The logarithm of the sum of e^logit; the e^logit, divided by that of the largest, go to `out` if it is wanted. Sums of a
   vector's lanes are in float, over the vectors in double. */
static inline double log_sum(const float* logits, int64_t n, float* out = nullptr, double* sum_out = nullptr) {
  float largest = logits[0];
  for (int64_t i = 1; i < n; ++i) largest = logits[i] > largest ? logits[i] : largest;
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += W) {
    int count = int(smaller(n - i, W));
    V e = exponential(load_part(logits + i, count) - largest);
    if (out) store_part(out + i, e, count);
    sum += double(sum_lanes(first_lanes(e, count)));
  }
  if (sum_out) *sum_out = sum;
  return double(largest) + logarithm(sum);
}

struct CrossEntropy {
  int64_t N, V_;
  const int64_t* targets;
  float scale;
  float* logits;
  double* nats;

  void work(int thread, int count) const {
    FlushSubnormals flush;
    for (int64_t row = N * thread / count; row < N * (thread + 1) / count; ++row) {
      float* p = logits + row * V_;
      const int64_t target = targets[row];
      if (target < 0) {
        nats[row] = 0.0;
        clear(p, V_);
        continue;
      }
      const double at_target = p[target];
      double sum;
      nats[row] = log_sum(p, V_, p, &sum) - at_target;
      const V by = splat(float(double(scale) / sum));
      for (int64_t i = 0; i < V_; i += W) {
        int valid = int(smaller(V_ - i, W));
        store_part(p + i, load_part(p + i, valid) * by, valid);
      }
      p[target] -= scale;
    }
  }
};

static void cross_entropy(int64_t N, int64_t V_, const int64_t* targets, float scale, int32_t num_threads, float* logits,
                          double* nats) {
  CrossEntropy loss{N, V_, targets, scale, logits, nats};
  int threads = useful_threads(int(smaller(num_threads, larger(N, 1))), 16.0 * double(N) * double(V_), 1.0);
  parallel(
      threads,
      [](void* context, int thread, int count) { static_cast<const CrossEntropy*>(context)->work(thread, count); }, &loss);
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
