/* A vector of the target's width, by the vector extensions of GCC and Clang: the same source for SSE2, AVX2, AVX-512, NEON.

   Everything here and in the headers below it stands in a namespace of the target's name, because the same source is
   compiled with several instruction sets into one library. No standard header with inline functions may be included by
   them: the linker would keep one copy, perhaps the one that the processor cannot run. */

#ifndef LONGSHORT_VECTOR_H
#define LONGSHORT_VECTOR_H

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ls {
namespace LS_TARGET {

#if defined(__AVX512F__)
constexpr int W = 16; /* floats in a vector */
constexpr int kAccumulators = 24; /* vectors of sums that a tile keeps in registers, of 32 */
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kAccumulators = 12; /* of 16 */
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int kAccumulators = 24; /* of 32 */
#else
constexpr int W = 4;
constexpr int kAccumulators = 12; /* of 16 */
#endif

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));

static inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

static inline V splat(float x) { return x - V{}; }

/* All bits of the first `n` lanes. */
static inline VI lanes_below(int n) {
  VI lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < n;
}

/* The first `n` of a vector's floats, the others 0. Nothing beyond them is read or written. */
static inline V load_part(const float* p, int n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  return (V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
  return (V)_mm256_maskload_ps(p, (__m256i)lanes_below(n));
#else
  float part[W] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
#endif
}

static inline void store_part(float* p, V v, int n) {
  if (n >= W) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)lanes_below(n), (__m256)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

/* The first `n` lanes, the others 0 or those of `rest`. */
static inline V first_lanes(V v, int n, V rest = V{}) { return lanes_below(n) ? v : rest; }

/* The smaller, the larger of x and a limit; NaN where x is NaN. */
static inline V at_most(V x, float limit) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_min_ps(0xFFFF, (__m512)splat(limit), (__m512)x); /* of a pair with NaN it gives the second */
#elif defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)splat(limit), (__m256)x);
#else
  return x > limit ? splat(limit) : x;
#endif
}

static inline V at_least(V x, float limit) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_max_ps(0xFFFF, (__m512)splat(limit), (__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)splat(limit), (__m256)x);
#else
  return x < limit ? splat(limit) : x;
#endif
}

static inline float sum_lanes(V v) {
  typedef float Quarter __attribute__((vector_size(16)));
  float lanes[W];
  store(lanes, v);
  Quarter sum{};
  for (int i = 0; i < W; i += 4) {
    Quarter part;
    __builtin_memcpy(&part, lanes + i, sizeof part);
    sum += part;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* Lanes of two vectors by number, those of b from W on. GCC makes a shuffle of an index that is computed, even where all of it
   is known, of one instruction for every lane; so the numbers are part of the type. */
template <int... kFrom>
static inline V lanes_of(V a, V b) {
#if defined(__clang__)
  return (V)__builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, VI{kFrom...});
#endif
}

template <class Int, Int... kLane>
struct LaneList {};

template <int kCount>
struct Counted {
#if defined(__clang__)
  using Lanes = __make_integer_seq<LaneList, int, kCount>;
#else
  using Lanes = LaneList<int, __integer_pack(kCount)...>;
#endif
};
using AllLanes = Counted<W>::Lanes;

/* Two vectors cut in pieces of kHalf lanes: a's even ones and b's odd ones. */
template <int kHalf, int... kLane>
static inline V kept(V a, V b, LaneList<int, kLane...>) {
  return VI{(kLane & kHalf ? -1 : 0)...} ? b : a;
}

/* And a's odd ones and b's even ones, each where the other was. */
template <int kHalf, int... kLane>
static inline V crossed(V a, V b, LaneList<int, kLane...>) {
  return lanes_of<(kLane & kHalf ? W + kLane - kHalf : kLane + kHalf)...>(a, b);
}

/* The square of v's lanes, mirrored: v[i][j] becomes v[j][i]. Halves change places, then halves of halves, ... */
template <int kHalf = W / 2>
static inline void mirror(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & kHalf) continue;
    V a = v[i], b = v[i + kHalf], exchanged = crossed<kHalf>(a, b, AllLanes());
    v[i] = kept<kHalf>(a, exchanged, AllLanes());
    v[i + kHalf] = kept<kHalf>(exchanged, b, AllLanes());
  }
  if constexpr (kHalf > 1) mirror<kHalf / 2>(v);
}

/* Sums of two neighbouring pieces of a vector, a's in its even places and b's in its odd ones. */
template <int kHalf>
static inline V folded(V a, V b) {
  return kept<kHalf>(a, b, AllLanes()) + crossed<kHalf>(a, b, AllLanes());
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Flushes subnormal numbers to zero while it lives. */
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
