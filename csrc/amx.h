/* Products by the matrix unit of Intel's processors (AMX): eight registers of 16 rows of 64 bytes.

   One instruction adds to 16 x 16 sums the products of 16 rows of a left factor with 16 columns of a panel, 32 of k at a time. It
   takes as long for fewer rows. For each sum k ascends, whatever the rows, so a row's bits do not depend on the others. */

#ifndef LONGSHORT_AMX_H
#define LONGSHORT_AMX_H

#include "factors.h"

namespace ls {
namespace LS_TARGET {

constexpr int kUnitRows = 16;

/* Where a tile's sums start from and go to: row r, vector n is at p + r * row + n * vector. Handed on by reference: a copy
   on the stack is read in wider parts than it was written in, for which a processor waits until all its stores are done. */
struct Place {
  float* p;
  int64_t row, vector;
  Place at(int64_t r, int64_t n) const { return {p ? p + r * row + n * vector : nullptr, row, vector}; }
};

/* What to bring from the shared cache into the core's own while a tile is multiplied: the panel that comes next, a few
   lines at every block of k, so that its transfer hides behind the arithmetic on this one. */
struct Ahead {
  const float* p;
  int64_t lines; /* at every block; 0: nothing */

  /* Those of some blocks. */
  void bring(int64_t blocks) {
    for (const float* end = p + blocks * lines * 16; p < end; p += 16) __builtin_prefetch(p, 0, 2);
  }
};

/* A register's rows: where they are, and where their sums start from and go to. */
struct TileRows {
  int count;
  const float* a;
  Place start, out;
};

#if defined(__AMX_BF16__)

/* The compilers' own functions do not say that they read memory. Strides are in floats. */
template <int kRegister>
static inline void load_tile(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride * 4), "i"(kRegister) : "memory");
}

template <int kRegister>
static inline void store_tile(const Place& out) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(out.p), "r"(out.row * 4), "i"(kRegister) : "memory");
}

template <int kRegister>
static inline void start_tile(const Place& start) {
  if (start.p)
    load_tile<kRegister>(start.p, start.row);
  else
    asm volatile("tilezero %%tmm%c0" : : "i"(kRegister));
}

template <int kSums, int kLeft, int kRight>
static inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

/* How the registers are shaped; 0: the unit is free. */
static thread_local int shaped = 0;

/* One register of `first` rows: sums 0-3, left 4 to 6, right 7. A full one and one of `second`: sums 0, 1 and 2, 3, left 4 and 5,
   right 6 and 7. */
static inline void shape_tiles(int first, int second) {
  const int shape = first == kUnitRows && !second ? 2 * kUnitRows : first + second; /* both ways all are full */
  if (shape == shaped) return; /* it takes as long as a dozen products */
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = kUnitRows;
  }
  if (second)
    config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second); /* the first is full */
  else
    for (int i = 0; i < 7; ++i) config.rows[i] = uint8_t(first);
  asm volatile("ldtilecfg %0" : : "m"(config));
  shaped = shape;
}

/* Frees the unit where it ends: the system has less to save, and whoever uses it next shapes it anew. */
struct MatrixUnit {
  ~MatrixUnit() {
    if (shaped) asm volatile("tilerelease");
    shaped = 0;
  }
};

constexpr int64_t kUnitPlaces = 16; /* rows of a panel that are read at once, and of a part of a left factor floats */

/* Floats from one row of a left factor to the next. */
template <class F>
constexpr int64_t unit_row() {
  return F::kJoined * F::S;
}

/* A vector's sums += those of the rows in registers 4 (of a sum of parts 4, 5, 6 its parts) times the vector at `panel`. */
template <class F, int kSums>
static inline void multiply_vector(const float* panel, int64_t place) {
  load_tile<7>(panel, place);
  if constexpr (F::kParts == 1) {
    multiply_tiles<kSums, 4, 7>();
  } else if constexpr (F::kParts == 2) {
    multiply_tiles<kSums, 5, 7>(), multiply_tiles<kSums, 4, 7>();
    load_tile<7>(panel + W, place), multiply_tiles<kSums, 4, 7>();
  } else {
    multiply_tiles<kSums, 6, 7>(), multiply_tiles<kSums, 4, 7>(), multiply_tiles<kSums, 5, 7>();
    load_tile<7>(panel + W, place), multiply_tiles<kSums, 5, 7>(), multiply_tiles<kSums, 4, 7>();
    load_tile<7>(panel + 2 * W, place), multiply_tiles<kSums, 4, 7>();
  }
}

/* Products of some rows with N <= 4 vectors that begin at `panel`, of those that lie there `vectors` wide. */
template <class F, int N>
static void multiply_tile(int64_t k_blocks, const TileRows& rows, int64_t room, const float* panel, int vectors, Ahead ahead) {
  shape_tiles(rows.count, 0);
  const int64_t place = int64_t(vectors) * F::kWide;
  const float* a = rows.a;
  start_tile<0>(rows.start);
  if constexpr (N > 1) start_tile<1>(rows.start.at(0, 1));
  if constexpr (N > 2) start_tile<2>(rows.start.at(0, 2));
  if constexpr (N > 3) start_tile<3>(rows.start.at(0, 3));
  for (int64_t block = 0; block < k_blocks; block += F::kJoined) {
    ahead.bring(F::kJoined);
    load_tile<4>(a, unit_row<F>());
    if constexpr (F::kParts > 1) load_tile<5>(a + kUnitPlaces, unit_row<F>());
    if constexpr (F::kParts > 2) load_tile<6>(a + 2 * kUnitPlaces, unit_row<F>());
    multiply_vector<F, 0>(panel, place);
    if constexpr (N > 1) multiply_vector<F, 1>(panel + F::kWide, place);
    if constexpr (N > 2) multiply_vector<F, 2>(panel + 2 * F::kWide, place);
    if constexpr (N > 3) multiply_vector<F, 3>(panel + 3 * F::kWide, place);
    a += room * unit_row<F>();
    panel += kUnitPlaces * place;
  }
  store_tile<0>(rows.out);
  if constexpr (N > 1) store_tile<1>(rows.out.at(0, 1));
  if constexpr (N > 2) store_tile<2>(rows.out.at(0, 2));
  if constexpr (N > 3) store_tile<3>(rows.out.at(0, 3));
}

/* Of two registers of rows and N <= 2 vectors at once: a part of the rows into registers 4 and 5, one of the vectors into 6 and
   7, all products of what is there. */
template <class F>
static inline void load_rows(const float* upper, const float* lower, int part) {
  load_tile<4>(upper + part * kUnitPlaces, unit_row<F>());
  load_tile<5>(lower + part * kUnitPlaces, unit_row<F>());
}

template <class F, int N>
static inline void load_vectors(const float* panel, int64_t place, int part) {
  load_tile<6>(panel + part * W, place);
  if constexpr (N > 1) load_tile<7>(panel + F::kWide + part * W, place);
}

template <int N>
static inline void multiply_all() {
  multiply_tiles<0, 4, 6>();
  if constexpr (N > 1) multiply_tiles<1, 4, 7>();
  multiply_tiles<2, 5, 6>();
  if constexpr (N > 1) multiply_tiles<3, 5, 7>();
}

/* The same of two registers of rows, the first full, and N <= 2 vectors: what is loaded is used twice. For each sum in the order
   of `multiply_vector`. */
template <class F, int N>
static void multiply_two_tiles(int64_t k_blocks, const TileRows* rows, int64_t room, const float* panel, int vectors,
                               Ahead ahead) {
  shape_tiles(kUnitRows, rows[1].count);
  const int64_t place = int64_t(vectors) * F::kWide;
  const float *upper = rows[0].a, *lower = rows[1].a;
  start_tile<0>(rows[0].start);
  start_tile<2>(rows[1].start);
  if constexpr (N > 1) start_tile<1>(rows[0].start.at(0, 1));
  if constexpr (N > 1) start_tile<3>(rows[1].start.at(0, 1));
  for (int64_t block = 0; block < k_blocks; block += F::kJoined) {
    ahead.bring(F::kJoined);
    load_vectors<F, N>(panel, place, 0);
    if constexpr (F::kParts == 1) {
      load_rows<F>(upper, lower, 0), multiply_all<N>();
    } else if constexpr (F::kParts == 2) {
      load_rows<F>(upper, lower, 1), multiply_all<N>();
      load_rows<F>(upper, lower, 0), multiply_all<N>();
      load_vectors<F, N>(panel, place, 1), multiply_all<N>();
    } else {
      load_rows<F>(upper, lower, 2), multiply_all<N>();
      load_rows<F>(upper, lower, 0), multiply_all<N>();
      load_rows<F>(upper, lower, 1), multiply_all<N>();
      load_vectors<F, N>(panel, place, 1), multiply_all<N>();
      load_rows<F>(upper, lower, 0), multiply_all<N>();
      load_vectors<F, N>(panel, place, 2), multiply_all<N>();
    }
    upper += room * unit_row<F>();
    lower += room * unit_row<F>();
    panel += kUnitPlaces * place;
  }
  store_tile<0>(rows[0].out);
  store_tile<2>(rows[1].out);
  if constexpr (N > 1) store_tile<1>(rows[0].out.at(0, 1));
  if constexpr (N > 1) store_tile<3>(rows[1].out.at(0, 1));
}

/* out[rows][N W] = start + A[rows][K] panel[K][N W] of `rows` <= 32; the first of them is at `a`. */
template <class F, int N>
static void multiply_by_unit(int rows, int64_t k_blocks, const float* a, int64_t room, const float* panel,
                             const Place& start, const Place& out, Ahead ahead) {
  if (rows <= kUnitRows) {
    multiply_tile<F, N>(k_blocks, {rows, a, start, out}, room, panel, N, ahead);
    return;
  }
  ahead.lines = ceil_div(ahead.lines, (N + 1) / 2); /* of as many turns */
  for (int n = 0; n < N; n += 2) {
    const TileRows both[2] = {
        {kUnitRows, a, start.at(0, n), out.at(0, n)},
        {rows - kUnitRows, a + kUnitRows * unit_row<F>(), start.at(kUnitRows, n), out.at(kUnitRows, n)}};
    if (n + 1 < N)
      multiply_two_tiles<F, 2>(k_blocks, both, room, panel + n * F::kWide, N, ahead);
    else
      multiply_two_tiles<F, 1>(k_blocks, both, room, panel + n * F::kWide, N, ahead);
    ahead.p += k_blocks * ahead.lines * 16;
  }
}

/* Products that sum over rows of a panel: of up to two registers of columns of the other factor, as `store_rows` leaves them, with
   the N vectors of the panel, of which `columns` are not padding. */
template <class F, int N>
static void multiply_outer_by_unit(int64_t k_blocks, const TileRows* rows, const float* panel, int columns) {
  const bool whole = columns == N * W && !rows[0].start.p;
  const bool both = rows[0].count == kUnitRows && rows[1].count;
  for (int i = 0; i < 2; ++i) /* where the sums will go: the caches' slowest part, so it is asked for first */
    for (int r = 0; r < rows[i].count; ++r)
      for (int n = 0; n < N; ++n) __builtin_prefetch(rows[i].out.at(r, n).p, 0, 2);
  alignas(64) float sums[2][kUnitRows * N * W];
  TileRows to[2] = {rows[0], rows[1]};
  for (int i = 0; i < 2 && !whole; ++i) to[i].start = {nullptr, 0, 0}, to[i].out = {sums[i], N * W, W};
  if (both) multiply_two_tiles<F, N>(k_blocks, to, W, panel, N, {});
  for (int i = 0; i < 2 && rows[i].count; ++i) {
    if (!both) multiply_tile<F, N>(k_blocks, to[i], W, panel, N, {});
    for (int r = 0; r < rows[i].count && !whole; ++r)
      for (int n = 0; n < N; ++n) {
        const int lanes = columns - n * W < W ? columns - n * W : W;
        float* p = rows[i].out.at(r, n).p;
        const V sum = load(sums[i] + (r * N + n) * W);
        store_part(p, rows[i].start.p ? load_part(p, lanes) + sum : sum, lanes);
      }
  }
}

#else

struct MatrixUnit {
  MatrixUnit() {}
};

template <class F, int N>
void multiply_by_unit(int rows, int64_t k_blocks, const float* a, int64_t room, const float* panel, const Place& start,
                      const Place& out, Ahead ahead);

template <class F, int N>
void multiply_outer_by_unit(int64_t k_blocks, const TileRows* rows, const float* panel, int columns);

#endif

}  // namespace LS_TARGET
}  // namespace ls

#endif
