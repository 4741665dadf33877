/* What products multiply.

     Floats     numbers of float32
     Bfloat16   in the targets of that name: a float's first 16 bits
     Parts      in the target amx, for the products of whole chunks in training: a float32 as the sum of three numbers of
                bfloat16, which hold 8 bits each of its 24:

                  a = a0 + a1 + a2,  a0 = bfloat16(a),  a1 = bfloat16(a - a0),  a2 = bfloat16(a - a0 - a1)
                  a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + what is below 2^-24 of it

                A matrix unit makes these six products in less time than vectors the one. Of numbers below 2^-110 the last parts
                are subnormal, which it takes as 0; a number that has no parts (`have_parts`) makes NaN of the sums that it is in.
     Halves     in the target amx_bf16x3: the first two parts and the first three products, what PyTorch calls the precision
                "high": about 16 bits. What is beyond the largest number that has parts, infinity too, becomes that number.

   Sums are float32 always. Each kind has

     kPair     factors that follow each other in k and lie in the place of one float: 1 float, or 2 numbers of bfloat16
     kParts    numbers that a factor is the sum of
     kPartless whether numbers without parts are to be looked for: their products are left to floats
     kJoined   blocks of W columns of which a row of a left factor lies together: 2 where a matrix unit reads 64 bytes of it

   Left factors are [k / (kJoined W)][row][part][kJoined W / kPair], panels [k / kPair][N][part][W]. A factor whose number of k
   does not fill its last place, or its last kJoined blocks, ends in zeros. */

#ifndef LONGSHORT_FACTORS_H
#define LONGSHORT_FACTORS_H

#include "vector.h"

namespace ls {
namespace LS_TARGET {

struct Floats {
  static constexpr int kPair = 1, kParts = 1, kJoined = 1;
  static constexpr bool kPartless = false;
  static V bounded(V v) { return v; }
  static V next_together(const V* v) { return v[0]; }
  static void store_right(float* p, int64_t, V v) { store(p, v); }
  static void store_left(float* p, V v) { store(p, v); }
  static V splat_left(const float* p) { return splat(*p); }
  static V multiply_add(V s, V w, V sum) { return sum + s * w; }
  static float of_panel(const float* panel, int64_t columns, int64_t k, int64_t column) { return panel[k * columns + column]; }
};

#if defined(__AVX512BF16__)

template <int kNumParts, int kNumJoined>
struct Pairs {
  static constexpr int kPair = 2, kParts = kNumParts, kJoined = kNumJoined;
  static constexpr bool kPartless = kParts == 3;
  static constexpr float kLargest = 0x1.FEp127f; /* that has parts */

  /* The next part of each number: its bits, in the lower half of each lane. What is left then is in its place. */
  static VI next_part(V& v) {
    const VI part = in_lanes((__m256i)_mm512_cvtneps_pbh((__m512)v));
    v -= (V)(part << 16);
    return part;
  }
  /* Whether the parts can stand for all of a vector's numbers: not for those that are not finite, or round to infinity. */
  static bool have_parts(V v) {
    return !_mm512_cmp_ps_mask(_mm512_abs_ps((__m512)v), (__m512)splat(kLargest), _CMP_NLE_UQ);
  }
  /* Numbers that have parts in the place of those that are too large; where one part is all, infinity is its own. */
  static V bounded(V v) {
    if constexpr (kParts == 2) return at_least(at_most(v, kLargest), -kLargest);
    return v;
  }

  static VI in_lanes(__m256i bits) { return (VI)_mm512_maskz_cvtepu16_epi32(0xFFFF, bits); }

  /* Of two vectors' numbers, those of the first before the others'. */
  static V next_row(V& a, V& b) {
    const __m512i part = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    a -= (V)(in_lanes(_mm512_maskz_extracti64x4_epi64(0xFF, part, 0)) << 16);
    b -= (V)(in_lanes(_mm512_maskz_extracti64x4_epi64(0xFF, part, 1)) << 16);
    return (V)part;
  }

  /* Lane by lane two vectors that follow each other in k: their next parts. */
  static V next_together(V* v) {
    const VI first = next_part(v[0]);
    return (V)(first | next_part(v[1]) << 16);
  }

  /* A vector of row k of a panel, `p` its place. Rows come in ascending order. */
  static void store_right(float* p, int64_t k, V v) {
    v = bounded(v);
    for (int part = 0; part < kParts; ++part, p += W) {
      const VI bits = next_part(v);
      store(p, (V)(k % 2 ? (VI)load(p) | bits << 16 : bits));
    }
  }

  /* W of a left factor's columns. */
  static void store_left(float* p, V v) {
    v = bounded(v);
    for (int part = 0; part < kParts; ++part, p += kJoined * W / kPair) {
      const __m256i bits = _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)next_part(v));
      __builtin_memcpy(p, &bits, sizeof bits);
    }
  }

  /* A place of a left factor in all lanes: bits, since half of a pair may not be a number. */
  static V splat_left(const float* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (V)_mm512_set1_epi32(bits);
  }

  static V multiply_add(V s, V w, V sum) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)s, (__m512bh)w); }

  /* What a panel of `columns` holds in a column for k. */
  static float of_panel(const float* panel, int64_t columns, int64_t k, int64_t column) {
    const float* p = panel + (k / 2 * columns + column / W * W) * kParts + column % W;
    float sum = 0.0f;
    for (int part = 0; part < kParts; ++part) {
      uint32_t bits;
      __builtin_memcpy(&bits, p + part * W, sizeof bits);
      bits = k % 2 ? bits & 0xFFFF0000u : bits << 16;
      float one;
      __builtin_memcpy(&one, &bits, sizeof one);
      sum += one;
    }
    return sum;
  }
};

#endif

/* How deep a product is: `blocks` of k, with those that only fill up. Of those from `whole` on `rest` places are taken; what
   else they have room for is not multiplied. */
struct Depth {
  int64_t blocks, whole;
  int rest;
  /* `n` blocks of it, from block `k` on. */
  Depth part(int64_t k, int64_t n) const { return {n, whole <= k ? 0 : whole - k < n ? whole - k : n, rest}; }
};

/* A kind, and where its numbers lie. */
template <class Kind>
struct Factors : Kind {
  using Kind::kJoined, Kind::kPair, Kind::kParts;
  static constexpr bool kFloats = kPair == 1;
  static constexpr bool kUnit = kJoined > 1;        /* whether a matrix unit multiplies them */
  static constexpr int S = W / kPair * kParts;      /* floats that a row of a block takes in a left factor */
  static constexpr int kWide = W * kParts;          /* and a vector of a panel in a place */

  /* Rows of a panel that fill places, and where blocks are joined all of these. */
  static constexpr int64_t kWhole = kUnit ? kJoined * W : kPair;

  /* How many floats K rows of a panel take for each of its columns: as many as they have places, for every part. */
  static int64_t slots(int64_t K) { return ceil_div(K, kWhole) * kWhole / kPair * kParts; }

  /* Blocks of k with those that only fill up. */
  static int64_t padded(int64_t blocks) { return ceil_div(blocks, kJoined) * kJoined; }

  /* Of K rows of a panel; of K for each of `gates`, where a block of each in turn holds W of them. */
  static Depth depth_of(int64_t K, int gates = 1) {
    return {padded(ceil_div(K, W) * gates), K / W * gates, int(ceil_div(K % W, kPair))};
  }

  /* Floats of a left factor of `blocks` blocks, and where block `block` of a row lies in one that has room for `room` rows. */
  static int64_t left_floats(int64_t blocks, int64_t room) { return padded(blocks) * room * S; }
  static float* left_at(float* p, int64_t room, int64_t block, int64_t row) {
    return p + (block / kJoined * room + row) * kJoined * S + block % kJoined * (W / kPair);
  }

  /* Zeros in the blocks that only fill up a left factor of `blocks`. */
  static void fill_left(float* p, int64_t blocks, int64_t room, int64_t row0, int64_t row1) {
    for (int64_t block = blocks; block < padded(blocks); ++block)
      for (int64_t row = row0; row < row1; ++row) Kind::store_left(left_at(p, room, block, row), V{});
  }

  /* W rows of a panel, `p` the place of the first, `width` floats from one place to the next: the square at `v`, which is spent. */
  static void store_square(float* p, int64_t width, V* v) {
    for (int k = 0; k < W; ++k) v[k] = Kind::bounded(v[k]);
    for (int k = 0; k < W; k += kPair, p += width)
      for (int part = 0; part < kParts; ++part) store(p + part * W, Kind::next_together(v + k));
  }

  /* `rows` rows of a vector each as the first factor of a product that sums over them: a panel that is W wide; where blocks are
     joined squares of it, mirrored, which makes its columns the rows of a left factor. */
  static void store_rows(const float* from, int64_t rows, float* to) {
    for (int64_t row = 0; row < rows; row += kWhole, to += kWhole / kPair * kWide) {
      V numbers[kWhole];
      for (int k = 0; k < kWhole; ++k) numbers[k] = row + k < rows ? Kind::bounded(load(from + (row + k) * W)) : V{};
      if constexpr (kUnit) {
        mirror(numbers);
        mirror(numbers + W);
        for (int u = 0; u < W; ++u)
          for (int part = 0; part < kParts; ++part) store(to + u * kWide + part * W, Kind::next_row(numbers[u], numbers[W + u]));
      } else {
        store(to, Kind::next_together(numbers));
      }
    }
  }
};

/* Those of products step by step, and of a whole chunk. Where the second are others, only calls in training have them, of so many
   rows that it pays; and of those that have so many at each step all products. */
#if defined(LS_PARTS) && LS_PARTS == 2
using Step = Factors<Pairs<2, 2>>;
using OfChunk = Step;
#elif defined(LS_PARTS)
using Step = Factors<Floats>;
using OfChunk = Factors<Pairs<3, 2>>;
#elif defined(__AMX_BF16__)
using Step = Factors<Pairs<1, 2>>;
using OfChunk = Step;
#elif defined(__AVX512BF16__)
using Step = Factors<Pairs<1, 1>>;
using OfChunk = Step;
#else
using Step = Factors<Floats>;
using OfChunk = Step;
#endif

constexpr int64_t kManyRowsOfAStep = 32;

/* Whether it pays to make parts of factors, for products of `rows` rows with a matrix of height times width. Each number of the
   rows is cut up for all that it meets in the matrix: docs/log.md has where that turned. */
static inline bool are_many(int64_t rows, int64_t height, int64_t width) { return rows >= 256 && height >= 256 && width >= 256; }

}  // namespace LS_TARGET
}  // namespace ls

#endif
