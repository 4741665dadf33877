/* Choosing a symbol by its probability. Repeatable: the uniform number is Philox's (Salmon et al. 2011), the sums are in
   double and in the order of the symbols. generation.py says the same in Python. */

#include <math.h>

#include "internal.h"

namespace ls {

namespace {

/* The upper 53 of the first 64 bits that Philox4x32-10 gives for counter (position, stream) and key seed, in [0, 1). */
double uniform(uint64_t seed, uint64_t stream, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), uint32_t(stream), uint32_t(stream >> 32)};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c[1]) << 32 | c[0]) >> 11) * 0x1p-53;
}

/* A heap of symbols, the most probable on top, of equals the lower id. */
class Heap {
 public:
  Heap(const float* logits, int64_t* ids, int64_t size) : logits_(logits), ids_(ids), size_(size) {
    for (int64_t i = 0; i < size; ++i) ids[i] = i;
    for (int64_t i = size / 2; i-- > 0;) sink(i);
  }
  int64_t pop() {
    int64_t top = ids_[0];
    ids_[0] = ids_[--size_];
    ids_[size_] = top; /* those taken stand at the end, the last taken first */
    sink(0);
    return top;
  }

 private:
  bool before(int64_t a, int64_t b) const { return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b); }
  void sink(int64_t at) {
    for (;;) {
      int64_t child = 2 * at + 1;
      if (child >= size_) return;
      if (child + 1 < size_ && before(ids_[child + 1], ids_[child])) ++child;
      if (!before(ids_[child], ids_[at])) return;
      int64_t id = ids_[at];
      ids_[at] = ids_[child];
      ids_[child] = id;
      at = child;
    }
  }

  const float* logits_;
  int64_t* ids_;
  int64_t size_;
};

/* Leaves the symbols that top_k and top_p keep with their weight, the others with 0. */
void keep_most_probable(const float* logits, int64_t V, const ls_sampling& s, double* weight, int64_t* ids, double* kept) {
  Heap heap(logits, ids, V);
  int64_t most = s.top_k > 0 && s.top_k < V ? s.top_k : V, count = 0;
  double sum = 0.0;
  if (s.top_p > 0.0 && most == V)
    for (int64_t id = 0; id < V; ++id) sum += weight[id];
  for (int64_t i = 0; i < V; ++i) kept[i] = 0.0;
  if (most < V || s.top_p <= 0.0)
    for (; count < most; ++count) {
      int64_t id = heap.pop();
      kept[id] = weight[id];
      sum += weight[id];
    }
  if (s.top_p > 0.0) {
    double reached = 0.0;
    for (int64_t i = 0; i < most; ++i) {
      int64_t id = i < count ? ids[V - 1 - i] : heap.pop();
      kept[id] = reached >= s.top_p ? 0.0 : weight[id];
      reached += weight[id] / sum;
      if (i >= count && reached >= s.top_p) break;
    }
  }
}

}  // namespace

double logarithm(double x) { return log(x); }

size_t choice_bytes(int64_t V) { return size_t(V) * (2 * sizeof(double) + sizeof(int64_t)); }

int64_t choose_by_weight(const float* logits, int64_t best, int64_t V, const ls_sampling& s, int64_t step, double* scratch) {
  double* weight = scratch;
  if (s.top_k > 0 || s.top_p > 0.0) {
    keep_most_probable(logits, V, s, weight, reinterpret_cast<int64_t*>(scratch + 2 * V), scratch + V);
    weight += V;
  }
  double* reached = weight; /* the sum up to each symbol, in its place */
  double total = 0.0;
  for (int64_t id = 0; id < V; ++id) reached[id] = total += weight[id];
  const double wanted = uniform(s.seed, s.stream, uint64_t(s.position + step)) * total;
  for (int64_t id = 0; id < V; ++id)
    if (reached[id] > wanted) return id;
  for (int64_t id = V - 1; id > 0; --id) /* rounding may carry past the last symbol that can be chosen: that one then */
    if (reached[id] > reached[id - 1]) return id;
  return best;
}

}  // namespace ls
