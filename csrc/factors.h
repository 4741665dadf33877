/* What products multiply: floats, or in the target of that name numbers of bfloat16, a float's first 16 bits. Sums are float32.

   Two numbers of bfloat16 that follow each other in k lie in the place of a float: blocks of a left factor are [row][S], panels
   [k / kPair][N][W]. A factor with an odd number of k ends in a zero. */

#ifndef LONGSHORT_FACTORS_H
#define LONGSHORT_FACTORS_H

#include "vector.h"

namespace ls {
namespace LS_TARGET {

#if defined(__AVX512BF16__)

constexpr int kPair = 2; /* factors in the place of a float */

static inline VI to_bfloat16(V v) {
  return (VI)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

/* Lane by lane two vectors that follow each other in k. */
static inline V together(const V* v) { return (V)(to_bfloat16(v[0]) | to_bfloat16(v[1]) << 16); }

/* A vector of row k of a panel, `p` its place. Rows come in ascending order. */
static inline void store_right(float* p, int64_t k, V v) {
  store(p, (V)(k % 2 ? (VI)load(p) | to_bfloat16(v) << 16 : to_bfloat16(v)));
}

/* W of a left factor's columns. */
static inline void store_left(float* p, V v) {
  __m256i part = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &part, sizeof part);
}

/* A place of a left factor in all lanes: bits, since half of a pair may not be a number. */
static inline V splat_left(const float* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (V)_mm512_set1_epi32(bits);
}

static inline V multiply_add(V s, V w, V sum) {
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)s, (__m512bh)w);
}

/* What a place of a panel holds for k, of the kPair that share it. */
static inline float of_place(const float* p, int64_t k) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  bits = k % 2 ? bits & 0xFFFF0000u : bits << 16;
  float one;
  __builtin_memcpy(&one, &bits, sizeof one);
  return one;
}

#else

constexpr int kPair = 1;
static inline V together(const V* v) { return v[0]; }
static inline void store_right(float* p, int64_t, V v) { store(p, v); }
static inline void store_left(float* p, V v) { store(p, v); }
static inline V splat_left(const float* p) { return splat(*p); }
static inline V multiply_add(V s, V w, V sum) { return sum + s * w; }
static inline float of_place(const float* p, int64_t) { return *p; }

#endif

constexpr int S = W / kPair; /* floats that a row of a block takes in a left factor */

/* How many places K rows of a panel take. */
static inline int64_t slots(int64_t K) { return ceil_div(K, kPair); }

/* W rows of a panel, `p` the place of the first, `width` floats from one place to the next: the square at `v`. */
static inline void store_square(float* p, int64_t width, const V* v) {
  for (int k = 0; k < W; k += kPair) store(p + k / kPair * width, together(v + k));
}

/* `rows` rows of a vector each as a panel that is W wide. */
static inline void store_rows(const float* from, int64_t rows, float* panel) {
  for (int64_t row = 0; row < rows; row += kPair, panel += W) {
    const V both[2] = {load(from + row * W), row + 1 < rows ? load(from + (row + 1) * W) : V{}};
    store(panel, together(both));
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
