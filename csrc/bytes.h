/* Products of eight bits: a quarter of the memory to read, which is what one text alone waits for, and where the processor has an
   instruction for it (VNNI) four products in the place of one of floats, which is what many wait for.

   Each column of a panel has a scale, the largest of its weights / 127, and its weights are rounded to multiples of it. So is each
   row of a left factor, anew at every step:

     out = start + scale[row] scale[column] sum over k of q[row][k] q[k][column]

   The sums are whole numbers, so their order does not matter. The instruction multiplies bytes without sign by bytes with one, so
   a row's are stored as q + 128, and the sums begin at what that is too much, -128 times the column's sum. States, biases, what is
   added and everything else stay float32.

     place      four of k that follow each other
     panel      [column] scales, [column] where the sums begin, [k / 4][column][4] bytes
     left       [k / W][row][kPlaceFloats W / 4], then [row] scales */

#ifndef LONGSHORT_BYTES_H
#define LONGSHORT_BYTES_H

#include "tiles.h"

namespace ls {
namespace LS_TARGET {

constexpr int kPlaces = W / 4; /* in a block of k */

static inline VI load(const int32_t* p) {
  VI v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline VI splat_bits(const float* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits - VI{};
}

#if defined(__AVX512F__)

/* Four products in an instruction. By its name, as the target's build is for processors without it too. */
struct Fours {
  static constexpr int kPlaceFloats = 1;
  struct Left {
    VI bytes;
    explicit Left(const float* p) : bytes(splat_bits(p)) {}
  };
  struct Right {
    VI bytes;
    explicit Right(VI bytes) : bytes(bytes) {}
  };
  static void store_left(float* p, VI v) { _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)v)); }
  static VI multiply_add(const Left& a, const Right& w, VI sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a.bytes), "v"(w.bytes));
    return sum;
  }
};

#endif

/* Two products of 16 bits in an instruction, of k and k + 2, and two of k + 1 and k + 3. */
struct Twos {
  typedef int16_t VS __attribute__((vector_size(W * 4)));
  static constexpr int kPlaceFloats = 2;
  struct Left {
    VI even, odd;
    explicit Left(const float* p) : even(splat_bits(p)), odd(splat_bits(p + 1)) {}
  };
  struct Right {
    VI even, odd;
    explicit Right(VI bytes) : even((VI)((VS)bytes << 8 >> 8)), odd((VI)((VS)bytes >> 8)) {}
  };
  static void store_left(float* p, VI v) {
    int16_t words[2 * W];
    for (int k = 0; k < W; ++k) words[k / 4 * 4 + k % 2 * 2 + k % 4 / 2] = int16_t(v[k]);
    __builtin_memcpy(p, words, sizeof(float) * kPlaceFloats * kPlaces);
  }
  static VI multiply_add(const Left& a, const Right& w, VI sum) {
    return multiply_pairs(a.odd, w.odd, multiply_pairs(a.even, w.even, sum));
  }

 private:
  static VI multiply_pairs(VI a, VI w, VI sum) {
#if defined(__AVX512F__)
    return sum + (VI)_mm512_madd_epi16((__m512i)a, (__m512i)w);
#elif defined(__AVX2__)
    return sum + (VI)_mm256_madd_epi16((__m256i)a, (__m256i)w);
#elif defined(__SSE2__)
    return sum + (VI)_mm_madd_epi16((__m128i)a, (__m128i)w);
#else
    return sum + (a & 0xFFFF) * (w << 16 >> 16) + (a >> 16) * (w >> 16); /* a's are not below 0 */
#endif
  }
};

/* What a panel [K][columns] takes, and K rows of a left factor with room for `room`, counted in floats. K is a multiple of W. */
static inline int64_t bytes_floats(int64_t K, int64_t columns) { return 2 * columns + K * columns / 4; }
static inline int64_t byte_rows_floats(int64_t K, int64_t room) { return room * (Twos::kPlaceFloats * K / 4 + 1); }

/* A panel of floats as one of bytes. A column that is not finite has the scale NaN. */
static inline void round_panel(const float* panel, int64_t K, int64_t columns, float* out) {
  int32_t* starts = reinterpret_cast<int32_t*>(out + columns);
  int8_t* bytes = reinterpret_cast<int8_t*>(out + 2 * columns);
  for (int64_t column = 0; column < columns; ++column) {
    float largest = 0.0f, none = 0.0f;
    for (int64_t k = 0; k < K; ++k) {
      float weight = Step::of_panel(panel, columns, k, column), size = __builtin_fabsf(weight);
      largest = size > largest ? size : largest;
      none += weight * 0.0f;
    }
    float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      float q = Step::of_panel(panel, columns, k, column) * inverse;
      q = q < -127.0f ? -127.0f : q < 127.0f ? q : 127.0f; /* where a weight is not finite too */
      const int8_t byte = int8_t(q < 0.0f ? q - 0.5f : q + 0.5f);
      bytes[(k / 4 * columns + column) * 4 + k % 4] = byte;
      sum += byte;
    }
    out[column] = scale + none;
    starts[column] = -128 * sum;
  }
}

/* Rows [block][room][W] as a left factor. A row that is not finite has the scale NaN, and so will what it is multiplied to. */
template <class Products>
static inline void round_rows(const float* from, int64_t blocks, int64_t room, int64_t count, float* left) {
  constexpr int kFloats = Products::kPlaceFloats * kPlaces;
  float* scales = left + blocks * room * kFloats;
  for (int64_t row = 0; row < count; ++row) {
    V most{}, none{};
    for (int64_t block = 0; block < blocks; ++block) {
      const V v = load(from + (block * room + row) * W), size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
      none += v * 0.0f;
    }
    float largest = 0.0f;
    for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
    const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
    scales[row] = (largest > 1e-36f ? largest / 127.0f : 0.0f) + sum_lanes(none);
    for (int64_t block = 0; block < blocks; ++block) {
      const V q = load(from + (block * room + row) * W) * inverse + 128.5f;
      Products::store_left(left + (block * room + row) * kFloats, __builtin_convertvector(q, VI));
    }
  }
}

/* As `multiply`, of `row` and those after it in a left factor of `blocks`, and a panel of bytes. */
template <class Products, int R, int N>
static void multiply_bytes(int64_t blocks, const float* left, int64_t room, int64_t row, const float* panel, const Place& start,
                           const Place& out) {
  constexpr int kFloats = Products::kPlaceFloats * kPlaces;
  const float *a = left + row * kFloats, *scales = left + blocks * room * kFloats + row;
  const int32_t *starts = reinterpret_cast<const int32_t*>(panel + N * W), *bytes = starts + N * W;
  VI sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = load(starts + n * W);
  for (int64_t block = 0; block < blocks; ++block, a += room * kFloats)
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place, bytes += N * W) {
      const auto left_of = [&](int r) { return typename Products::Left(a + r * kFloats + place * Products::kPlaceFloats); };
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const typename Products::Right w(load(bytes + n * W));
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][n] = Products::multiply_add(left_of(r), w, sum[r][n]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      store(out.p + r * out.row + n * out.vector,
            load(start.p + r * start.row + n * start.vector) +
                __builtin_convertvector(sum[r][n], V) * load(panel + n * W) * scales[r]);
}

/* The same of `count` rows, as many tiles as they are. */
template <class Products, int N, int R = kAccumulators / N>
static inline void multiply_bytes_rows(int64_t count, int64_t blocks, const float* left, int64_t room, int64_t row,
                                       const float* panel, const Place& start, const Place& out) {
  int64_t done = 0;
  for (; count - done >= R; done += R)
    multiply_bytes<Products, R, N>(blocks, left, room, row + done, panel, start.at(done, 0), out.at(done, 0));
  if constexpr (R > 1)
    if (done < count)
      multiply_bytes_rows<Products, N, R - 1>(count - done, blocks, left, room, row + done, panel, start.at(done, 0),
                                              out.at(done, 0));
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
