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
template <class F, int R, int N>
static void multiply(const Depth& depth, const float* a, int64_t room, const float* panel, const Place& start, const Place& out,
                     Ahead ahead) {
  constexpr int S = F::S;
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
      V s = F::splat_left(a + r * S + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = F::multiply_add(s, w[n], sum[r][n]);
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

template <class F, int N>
constexpr int max_rows() {
  return F::kUnit ? 2 * kUnitRows : kAccumulators / N;
}

/* Floats of the sums of a tile of as many. */
template <class F, int N>
constexpr int tile_floats() {
  return max_rows<F, N>() * N * W;
}

/* The same for `rows` <= max_rows<F, N>(). */
template <class F, int N, int R = max_rows<F, N>()>
static inline void multiply_rows(int rows, const Depth& depth, const float* a, int64_t room, const float* panel,
                                 const Place& start, const Place& out, Ahead ahead) {
  if constexpr (F::kUnit) {
    multiply_by_unit<F, N>(rows, depth.blocks, a, room, panel, start, out, ahead);
  } else if constexpr (R == 1) {
    multiply<F, 1, N>(depth, a, room, panel, start, out, ahead);
  } else {
    if (rows == R)
      multiply<F, R, N>(depth, a, room, panel, start, out, ahead);
    else
      multiply_rows<F, N, R - 1>(rows, depth, a, room, panel, start, out, ahead);
  }
}

/* Rows cut into tiles of at most `most` rows: as even as they go, or full ones first, for a unit that takes as long for few. */
template <class F>
struct Tiles {
  int64_t rows, most, count;
  Tiles(int64_t rows, int64_t most) : rows(rows), most(most), count(ceil_div(rows, most)) {}
  int64_t begin(int64_t tile) const { return F::kUnit ? smaller(tile * most, rows) : rows * tile / count; }
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
template <class F>
constexpr int64_t max_depth() {
  return (F::kUnit ? 512 : 1024) / W;
}

/* Products of `n` rows, the first at `from`, with the panels [first, last), each `whole` deep: panel p's sums go to
   out + p * out_panel. `room`: rows that a block of the left factor has room for. k is cut into blocks, so that rows and
   panel meet in the core's own cache; `turn` alternates. */
template <class F>
static inline void multiply_deep(const float* packed, const Depth& whole, int64_t first, int64_t last, float* from, int64_t room,
                                 int64_t n, int64_t turn, const Place& out, int64_t out_panel) {
  constexpr int64_t kDepth = max_depth<F>(), kFloats = F::S * kPanel; /* of a block of a panel */
  Tiles<F> tiles(n, max_rows<F, kColumns>());
  const int64_t all = whole.blocks, depths = ceil_div(all, kDepth);
  for (int64_t d = 0; d < depths; ++d) {
    int64_t depth = turn & 1 ? depths - 1 - d : d;
    int64_t k = depth * kDepth, blocks = smaller(kDepth, all - k);
    Panels panels(packed + (first * all + k) * kFloats, blocks * kFloats, all * kFloats, last - first, turn + d,
                  (last - first) * all * kFloats > (1 << 18));
    for (int64_t i = 0; i < panels.count(); ++i)
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        int64_t row = tiles.begin(tile);
        Place sums = {out.p + (first + panels.index(i)) * out_panel + row * out.row, out.row, out.vector};
        multiply_rows<F, kColumns>(tiles.size(tile), whole.part(k, blocks), F::left_at(from, room, k, row), room, panels.at(i),
                                Place{d ? sums.p : nullptr, sums.row, sums.vector}, sums,
                                panels.ahead(i, tile, tiles.count, blocks));
      }
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
