/* What products multiply: floats, or in the targets of that name numbers of bfloat16, a float's first 16 bits. Sums are float32.

     kPair     factors that follow each other in k and lie in the place of one float: 1 float, or 2 numbers of bfloat16
     kJoined   blocks of W columns of which a row of a left factor lies together: 2 where a matrix unit reads 64 bytes of it

   Left factors are [k / (kJoined W)][row][kJoined S], panels [k / kPair][N][W]. A factor whose number of k does not fill its last
   place, or its last kJoined blocks, ends in zeros. */

#ifndef LONGSHORT_FACTORS_H
#define LONGSHORT_FACTORS_H

#include "vector.h"

namespace ls {
namespace LS_TARGET {

#if defined(__AVX512BF16__)

constexpr int kPair = 2;
#if defined(__AMX_BF16__)
constexpr int kJoined = 2;
#else
constexpr int kJoined = 1;
#endif

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

constexpr int kPair = 1, kJoined = 1;
static inline V together(const V* v) { return v[0]; }
static inline void store_right(float* p, int64_t, V v) { store(p, v); }
static inline void store_left(float* p, V v) { store(p, v); }
static inline V splat_left(const float* p) { return splat(*p); }
static inline V multiply_add(V s, V w, V sum) { return sum + s * w; }
static inline float of_place(const float* p, int64_t) { return *p; }

#endif

constexpr int S = W / kPair; /* floats that a row of a block takes in a left factor */

/* Rows of a panel that fill places, and where blocks are joined all of these. */
constexpr int64_t kWhole = kJoined > 1 ? kJoined * W : kPair;

/* How many places K rows of a panel take. */
static inline int64_t slots(int64_t K) { return ceil_div(K, kWhole) * kWhole / kPair; }

/* Blocks of k with those that only fill up. */
static inline int64_t padded(int64_t blocks) { return ceil_div(blocks, kJoined) * kJoined; }

/* How deep a product is: `blocks` of k, with those that only fill up. Of those from `whole` on `rest` places are taken; what
   else they have room for is not multiplied. */
struct Depth {
  int64_t blocks, whole;
  int rest;
  /* `n` blocks of it, from block `k` on. */
  Depth part(int64_t k, int64_t n) const { return {n, whole <= k ? 0 : whole - k < n ? whole - k : n, rest}; }
};

/* Of K rows of a panel; of K for each of `gates`, where a block of each in turn holds W of them. */
static inline Depth depth_of(int64_t K, int gates = 1) {
  return {padded(ceil_div(K, W) * gates), K / W * gates, int(ceil_div(K % W, kPair))};
}

/* Floats of a left factor of `blocks` blocks, and where block `block` of a row lies in one that has room for `room` rows. */
static inline int64_t left_floats(int64_t blocks, int64_t room) { return padded(blocks) * room * S; }
static inline float* left_at(float* p, int64_t room, int64_t block, int64_t row) {
  return p + ((block / kJoined * room + row) * kJoined + block % kJoined) * S;
}

/* Zeros in the blocks that only fill up a left factor of `blocks`. */
static inline void fill_left(float* p, int64_t blocks, int64_t room, int64_t row0, int64_t row1) {
  for (int64_t block = blocks; block < padded(blocks); ++block)
    for (int64_t row = row0; row < row1; ++row) store_left(left_at(p, room, block, row), V{});
}

/* W rows of a panel, `p` the place of the first, `width` floats from one place to the next: the square at `v`. */
static inline void store_square(float* p, int64_t width, const V* v) {
  for (int k = 0; k < W; k += kPair) store(p + k / kPair * width, together(v + k));
}

/* `rows` rows of a vector each as the first factor of a product that sums over them: a panel that is W wide; where blocks are
   joined squares of it, mirrored, which makes its columns the rows of a left factor. */
static inline void store_rows(const float* from, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; row += kWhole, to += kWhole / kPair * W) {
    V places[W];
    for (int i = 0; i < kWhole / kPair; ++i) {
      V both[2] = {};
      for (int k = 0; k < kPair; ++k)
        if (row + kPair * i + k < rows) both[k] = load(from + (row + kPair * i + k) * W);
      places[i] = together(both);
    }
    if (kJoined > 1) mirror(places); /* there are W of them */
    for (int i = 0; i < kWhole / kPair; ++i) store(to + i * W, places[i]);
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
