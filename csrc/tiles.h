/* Matrix products: tiles of sums that stay in registers.

   Blocked layout of a matrix with rows and K columns: [k / W][row][W], K padded with zeros to a multiple of W. The rows
   of a tile are then W floats apart, whatever K is: one pointer, one stream, no distance that is a multiple of 4096.
   A panel holds N vectors of columns of the other factor: [k][N][W].

   What a place of either holds is in factors.h: a float, or two numbers of bfloat16; how a matrix unit multiplies them in
   amx.h. */

#ifndef LONGSHORT_TILES_H
#define LONGSHORT_TILES_H

#include "amx.h"

namespace ls {
namespace LS_TARGET {

/* out[R][N W] = start + A[R][K] panel[K][N W], k ascending.
   a: the tile's first row in a left factor whose blocks have room for `room` rows. start.p NULL: from zero. */
template <int R, int N>
static void multiply(const Depth& depth, const float* a, int64_t room, const float* panel, const Place& start, const Place& out,
                     Ahead ahead) {
  V sum[R][N];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = start.p ? load(start.p + r * start.row + n * start.vector) : V{};
  const auto add = [&](int k) __attribute__((always_inline)) {
    V w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) w[n] = load(panel + (k * N + n) * W);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      V s = splat_left(a + r * S + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = multiply_add(s, w[n], sum[r][n]);
    }
  };
  for (int64_t block = 0; block < depth.whole; ++block) {
    ahead.bring(1);
#pragma GCC unroll 4
    for (int k = 0; k < S; ++k) add(k);
    a += room * S;
    panel += S * N * W;
  }
  for (int64_t block = depth.whole; block < depth.blocks; ++block) {
    ahead.bring(1);
    for (int k = 0; k < depth.rest; ++k) add(k);
    a += room * S;
    panel += S * N * W;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out.p + r * out.row + n * out.vector, sum[r][n]);
}

template <int N>
constexpr int max_rows() {
  return kJoined > 1 ? 2 * kUnitRows : kAccumulators / N;
}

/* Floats of the sums of a tile of as many. */
template <int N>
constexpr int tile_floats() {
  return max_rows<N>() * N * W;
}

/* The same for `rows` <= max_rows<N>(). */
template <int N, int R = max_rows<N>()>
static inline void multiply_rows(int rows, const Depth& depth, const float* a, int64_t room, const float* panel,
                                 const Place& start, const Place& out, Ahead ahead) {
  if constexpr (kJoined > 1) {
    multiply_by_unit<N>(rows, depth.blocks, a, room, panel, start, out, ahead);
  } else if constexpr (R == 1) {
    multiply<1, N>(depth, a, room, panel, start, out, ahead);
  } else {
    if (rows == R)
      multiply<R, N>(depth, a, room, panel, start, out, ahead);
    else
      multiply_rows<N, R - 1>(rows, depth, a, room, panel, start, out, ahead);
  }
}

/* Rows cut into tiles of at most `most` rows: as even as they go, or full ones first, for a unit that takes as long for few. */
struct Tiles {
  int64_t rows, most, count;
  Tiles(int64_t rows, int64_t most) : rows(rows), most(most), count(ceil_div(rows, most)) {}
  int64_t begin(int64_t tile) const { return kJoined > 1 ? smaller(tile * most, rows) : rows * tile / count; }
  int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

/* Panels that one thread reads again at every step. They are taken in alternating order, so that those it read last,
   which its cache still holds, are the next it reads; and where they do not all fit, the next is brought ahead. */
class Panels {
 public:
  Panels(const float* first, int64_t floats, int64_t stride, int64_t count, int64_t turn, bool large)
      : p_(first), floats_(floats), stride_(stride), count_(count), backward_(turn & 1), large_(large) {}
  Panels(const float* first, int64_t floats, int64_t stride, int64_t count, int64_t turn)
      : Panels(first, floats, stride, count, turn, floats * count > (1 << 18)) {}
  int64_t count() const { return count_; }
  int64_t index(int64_t i) const { return backward_ ? count_ - 1 - i : i; }
  const float* at(int64_t i) const { return p_ + index(i) * stride_; }
  /* The share of the panel after the i-th that one tile of `tiles` brings; a single tile has nothing to hide it behind. */
  Ahead ahead(int64_t i, int64_t tile, int64_t tiles, int64_t k_blocks) const {
    if (!large_ || tiles < 2 || i + 1 >= count_ || k_blocks == 0) return {nullptr, 0};
    int64_t lines = ceil_div(floats_, 16 * tiles * k_blocks);
    return {at(i + 1) + tile * k_blocks * lines * 16, lines};
  }

 private:
  const float* p_;
  int64_t floats_, stride_, count_;
  bool backward_, large_;
};

constexpr int kColumns = 2; /* vectors in a panel of a deep product */
constexpr int kPanel = kColumns * W;
/* Blocks of k at a time: 128 KB of a panel, beside as many rows of the left factor. A matrix unit is through with a panel sooner,
   so more of its rows have to be near. */
constexpr int64_t kDepth = (kJoined > 1 ? 512 : 1024) / W;

/* Products of `n` rows, the first at `from`, with the panels [first, last), each `whole` deep: panel p's sums go to
   out + p * out_panel. `room`: rows that a block of the left factor has room for. k is cut into blocks, so that rows and
   panel meet in the core's own cache; `turn` alternates. */
static inline void multiply_deep(const float* packed, const Depth& whole, int64_t first, int64_t last, float* from, int64_t room,
                                 int64_t n, int64_t turn, const Place& out, int64_t out_panel) {
  Tiles tiles(n, max_rows<kColumns>());
  const int64_t all = whole.blocks, depths = ceil_div(all, kDepth);
  for (int64_t d = 0; d < depths; ++d) {
    int64_t depth = turn & 1 ? depths - 1 - d : d;
    int64_t k = depth * kDepth, blocks = smaller(kDepth, all - k);
    Panels panels(packed + (first * all + k) * S * kPanel, blocks * S * kPanel, all * S * kPanel, last - first, turn + d,
                  (last - first) * all * S * kPanel > (1 << 18));
    for (int64_t i = 0; i < panels.count(); ++i)
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        int64_t row = tiles.begin(tile);
        Place sums = {out.p + (first + panels.index(i)) * out_panel + row * out.row, out.row, out.vector};
        multiply_rows<kColumns>(tiles.size(tile), whole.part(k, blocks), left_at(from, room, k, row), room, panels.at(i),
                                Place{d ? sums.p : nullptr, sums.row, sums.vector}, sums,
                                panels.ahead(i, tile, tiles.count, blocks));
      }
  }
}

/* Columns that a tile of `multiply_outer` has, and its rows: they divide W. */
constexpr int kOuterVectors = kJoined > 1 ? 2 : 3;
constexpr int kOuter = kOuterVectors * W;
constexpr int kOuterRows = kAccumulators / kOuterVectors < W ? kAccumulators / kOuterVectors : W;

/* c[r][column] (+)= sum over k of a[k][r] panel[k][column]: a as `store_rows` leaves it; c has `stride`. */
template <int N>
static void multiply_outer(int64_t K, const float* a, const float* panel, float* c, int64_t stride, int rows, int columns,
                           bool add) {
  for (int r = 0; r < rows; ++r) /* where the sums will go: the caches' slowest part, so it is asked for first */
    for (int n = 0; n < N; ++n) __builtin_prefetch(c + r * stride + n * W, 1, 3);
  V sum[kOuterRows][N];
#pragma GCC unroll 32
  for (int r = 0; r < kOuterRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = V{};
  const int64_t places = slots(K);
#pragma GCC unroll 2
  for (int64_t k = 0; k < places; ++k) {
    V w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) w[n] = load(panel + (k * N + n) * W);
#pragma GCC unroll 32
    for (int r = 0; r < kOuterRows; ++r) {
      V s = splat_left(a + k * W + r);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = multiply_add(s, w[n], sum[r][n]);
    }
  }
  if (columns == N * W && rows == kOuterRows) {
#pragma GCC unroll 32
    for (int r = 0; r < kOuterRows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* p = c + r * stride + n * W;
        store(p, add ? load(p) + sum[r][n] : sum[r][n]);
      }
    return;
  }
#pragma GCC unroll 32
  for (int r = 0; r < kOuterRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int lanes = columns - n * W < W ? columns - n * W : W;
      float* p = c + r * stride + n * W;
      if (r < rows) store_part(p, add ? load_part(p, lanes) + sum[r][n] : sum[r][n], lanes);
    }
}

/* Vectors of the panel that begins at `column`, of those that `columns` are cut into for `multiply_outer`. */
static inline int vectors_at(int64_t column, int64_t columns) {
  return int(smaller(ceil_div(columns - column, W), kOuterVectors));
}

/* The same for `rows` <= kOuterRows of c, and the panel that begins at `column`. */
static inline void multiply_outer_rows(int64_t K, const float* a, const float* panel, float* c, int64_t column,
                                       int64_t columns, int rows, bool add) {
  const int vectors = vectors_at(column, columns), valid = int(smaller(columns - column, vectors * W));
  if (vectors == 3)
    multiply_outer<3>(K, a, panel, c + column, columns, rows, valid, add);
  else if (vectors == 2)
    multiply_outer<2>(K, a, panel, c + column, columns, rows, valid, add);
  else
    multiply_outer<1>(K, a, panel, c + column, columns, rows, valid, add);
}

/* `units` <= W rows of c, and their factors as `store_rows` leaves them. */
struct OuterRows {
  const float* a;
  float* c;
  int units;
};

/* How many of them are multiplied at once. */
constexpr int kOuterGroups = kJoined > 1 ? 2 : 1;

/* The same for kOuterGroups of them, the last perhaps without units, and the panels that begin at the columns from `begin` to
   `end`, of those that lie at `panels`: rows from end to end before the next. */
static inline void multiply_outer_stripe(int64_t K, const OuterRows* of, const float* panels, int64_t begin, int64_t end,
                                         int64_t columns, bool add) {
#if defined(__AMX_BF16__)
  for (int64_t column = begin; column < smaller(end, columns); column += kOuter) {
    TileRows rows[kOuterGroups] = {};
    for (int i = 0; i < kOuterGroups && of[i].units; ++i) {
      const Place out = {of[i].c + column, columns, W};
      rows[i] = {of[i].units, of[i].a, add ? out : Place{nullptr, 0, 0}, out};
    }
    const float* panel = panels + column * slots(K);
    const int64_t blocks = ceil_div(K, kWhole) * kJoined, valid = smaller(columns - column, kOuter);
    if (vectors_at(column, columns) == 2)
      multiply_outer_by_unit<2>(blocks, rows, panel, int(valid));
    else
      multiply_outer_by_unit<1>(blocks, rows, panel, int(valid));
  }
#else
  for (int u = 0; u < of->units; u += kOuterRows)
    for (int64_t column = begin; column < smaller(end, columns); column += kOuter)
      multiply_outer_rows(K, of->a + u, panels + column * slots(K), of->c + u * columns, column, columns,
                          int(smaller(of->units - u, kOuterRows)), add);
#endif
}

/* Row `at` of a matrix into the panels [first, last) of `multiply_outer`, of `rows` rows. NULL: zeros; `mask` multiplies. */
static inline void store_columns(const float* from, const float* mask, int64_t columns, int64_t at, int64_t rows,
                                 int64_t first, int64_t last, float* out) {
  for (int64_t panel = first; panel < last; ++panel) {
    int64_t column = panel * kOuter;
    int vectors = vectors_at(column, columns);
    float* to = out + panel * slots(rows) * kOuter + at / kPair * vectors * W;
    for (int i = 0; i < vectors; ++i, column += W) {
      int valid = int(smaller(columns - column, W));
      V v = from ? load_part(from + column, valid) : V{};
      store_right(to + i * W, at, mask ? v * load_part(mask + column, valid) : v);
    }
  }
}

/* Zeros in the rows of such panels that only fill up. Those of the last place are already there. */
static inline void fill_columns(int64_t columns, int64_t rows, int64_t first, int64_t last, float* out) {
  for (int64_t at = ceil_div(rows, kPair) * kPair; at < slots(rows) * kPair; at += kPair)
    store_columns(nullptr, nullptr, columns, at, rows, first, last, out);
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
