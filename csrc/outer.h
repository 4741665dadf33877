/* Products that sum over rows, of which the gradients of weights are made: c[r][column] (+)= sum over k of a[k][r] b[k][column]. */

#ifndef LONGSHORT_OUTER_H
#define LONGSHORT_OUTER_H

#include "tiles.h"

namespace ls {
namespace LS_TARGET {

/* `units` <= W rows of c, and their factors as `store_rows` leaves them. */
struct OuterRows {
  const float* a;
  float* c;
  int units;
};

/* The columns of b lie in panels, [panel of kColumns][place of k][vector], the last of them only as many vectors wide as it has. */
template <class F>
struct Outer {
  static constexpr int kVectors = F::kUnit ? 2 : 3; /* columns that a tile has, and its rows: they divide W */
  static constexpr int kColumns = kVectors * W;
  static constexpr int kRows = kAccumulators / kVectors < W ? kAccumulators / kVectors : W;
  static constexpr int kGroups = F::kUnit ? 2 : 1; /* groups of rows that are multiplied at once */

  static int64_t panels(int64_t columns) { return ceil_div(columns, kColumns); }

  /* Floats of one panel, and of all. */
  static int64_t panel_floats(int64_t rows) { return F::slots(rows) * kColumns; }
  static int64_t floats(int64_t columns, int64_t rows) { return panels(columns) * panel_floats(rows); }

  /* Floats of a group of rows of c: of their factors, for `rows` of k. */
  static int64_t group_floats(int64_t rows) { return F::slots(rows) * W; }

  /* Vectors of the panel that begins at `column`. */
  static int vectors_at(int64_t column, int64_t columns) { return int(smaller(ceil_div(columns - column, W), kVectors)); }

  /* kGroups groups of rows, the last perhaps without units, and the panels that begin at the columns from `begin` to `end`, of
     those that lie at `b`: rows from end to end before the next. `add`: to what c holds. */
  static void multiply_stripe(int64_t K, const OuterRows* of, const float* b, int64_t begin, int64_t end, int64_t columns,
                              bool add) {
    if constexpr (F::kUnit) {
      for (int64_t column = begin; column < smaller(end, columns); column += kColumns) {
        TileRows rows[kGroups] = {};
        for (int i = 0; i < kGroups && of[i].units; ++i) {
          const Place out = {of[i].c + column, columns, W};
          rows[i] = {of[i].units, of[i].a, add ? out : Place{nullptr, 0, 0}, out};
        }
        const float* panel = b + column * F::slots(K);
        const int64_t blocks = ceil_div(K, F::kWhole) * F::kJoined, valid = smaller(columns - column, kColumns);
        if (vectors_at(column, columns) == 2)
          multiply_outer_by_unit<F, 2>(blocks, rows, panel, int(valid));
        else
          multiply_outer_by_unit<F, 1>(blocks, rows, panel, int(valid));
      }
    } else if (F::kFloats && K == 1 && !add) {
      multiply_one(*of, b, begin, smaller(end, columns), columns);
    } else {
      for (int u = 0; u < of->units; u += kRows)
        for (int64_t column = begin; column < smaller(end, columns); column += kColumns)
          multiply_rows(K, of->a + u, b + column * F::slots(K), of->c + u * columns, column, columns,
                        int(smaller(of->units - u, kRows)), add);
    }
  }

  /* Row `at` of a matrix into the panels [first, last), of `rows` rows. NULL: zeros; `mask` multiplies. */
  static void store_columns(const float* from, const float* mask, int64_t columns, int64_t at, int64_t rows, int64_t first,
                            int64_t last, float* out) {
    for (int64_t panel = first; panel < last; ++panel) {
      int64_t column = panel * kColumns;
      int vectors = vectors_at(column, columns);
      float* to = place(out, rows, panel, at, vectors);
      for (int i = 0; i < vectors; ++i, column += W) {
        int valid = int(smaller(columns - column, W));
        V v = from ? load_part(from + column, valid) : V{};
        F::store_right(to + i * F::kWide, at, mask ? v * load_part(mask + column, valid) : v);
      }
    }
  }

  /* Where row `at` of a panel lies, `vectors` wide. */
  static float* place(float* out, int64_t rows, int64_t panel, int64_t at, int vectors) {
    return out + panel * panel_floats(rows) + at / F::kPair * vectors * F::kWide;
  }

  /* Zeros in the rows of such panels that only fill up. Those of the last place are already there. */
  static void fill_columns(int64_t columns, int64_t rows, int64_t first, int64_t last, float* out) {
    for (int64_t at = ceil_div(rows, F::kPair) * F::kPair; at < ceil_div(rows, F::kWhole) * F::kWhole; at += F::kPair)
      store_columns(nullptr, nullptr, columns, at, rows, first, last, out);
  }

 private:
  /* The same for `rows` <= kRows of c, and the panel that begins at `column`. */
  static void multiply_rows(int64_t K, const float* a, const float* panel, float* c, int64_t column, int64_t columns, int rows,
                            bool add) {
    const int vectors = vectors_at(column, columns), valid = int(smaller(columns - column, vectors * W));
    if (vectors == 3)
      multiply_vectors<3>(K, a, panel, c + column, columns, rows, valid, add);
    else if (vectors == 2)
      multiply_vectors<2>(K, a, panel, c + column, columns, rows, valid, add);
    else
      multiply_vectors<1>(K, a, panel, c + column, columns, rows, valid, add);
  }

  /* One row of k, so that what is slow is to write c: row by row from end to end, as memory takes it fastest. */
  static void multiply_one(const OuterRows& of, const float* b, int64_t begin, int64_t end, int64_t columns) {
    for (int u = 0; u < of.units; ++u) {
      const V s = F::splat_left(of.a + u);
      float* c = of.c + u * columns;
      int64_t column = begin;
      for (; column + W <= end; column += W) store(c + column, F::multiply_add(s, load(b + column), V{}));
      if (column < end) store_part(c + column, F::multiply_add(s, load(b + column), V{}), int(end - column));
    }
  }

  /* c has `stride`. */
  template <int N>
  static void multiply_vectors(int64_t K, const float* a, const float* panel, float* c, int64_t stride, int rows, int columns,
                               bool add) {
    for (int r = 0; r < rows; ++r) /* where the sums will go: the caches' slowest part, so it is asked for first */
      for (int n = 0; n < N; ++n) __builtin_prefetch(c + r * stride + n * W, 1, 3);
    V sum[kRows][N];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = V{};
    const int64_t places = F::slots(K);
#pragma GCC unroll 2
    for (int64_t k = 0; k < places; ++k) {
      V w[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) w[n] = load(panel + (k * N + n) * W);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        V s = F::splat_left(a + k * W + r);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] = F::multiply_add(s, w[n], sum[r][n]);
      }
    }
    if (columns == N * W && rows == kRows) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          float* p = c + r * stride + n * W;
          store(p, add ? load(p) + sum[r][n] : sum[r][n]);
        }
      return;
    }
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const int lanes = columns - n * W < W ? columns - n * W : W;
        float* p = c + r * stride + n * W;
        if (r < rows) store_part(p, add ? load_part(p, lanes) + sum[r][n] : sum[r][n], lanes);
      }
  }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
