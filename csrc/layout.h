/* What forward and backward pass share: cells, sizes, steps, packing.

     unit block   W hidden units          U   unit blocks of a layer (H / W, rounded up)
     panel        of the forward pass: all gates of kUnits unit blocks, N = gates * kUnits vectors wide */

#ifndef LONGSHORT_LAYOUT_H
#define LONGSHORT_LAYOUT_H

#include "activations.h"
#include "direct.h"
#include "internal.h"
#include "outer.h"

namespace ls {
namespace LS_TARGET {

/* Cells. kSaved: vectors a unit block that the forward pass saves: the gates after their activation, for the GRU also
   W_hn h + b_hn, for the LSTM also c. */
struct RnnTanh {
  static constexpr int kCell = LS_RNN_TANH, kGates = 1, kUnits = 2, kSaved = 1, kBiases = 1;
};
struct RnnRelu {
  static constexpr int kCell = LS_RNN_RELU, kGates = 1, kUnits = 2, kSaved = 1, kBiases = 1;
};
struct Gru {
  static constexpr int kCell = LS_GRU, kGates = 3, kUnits = 1, kSaved = 4, kBiases = 4;
};
struct Lstm {
  static constexpr int kCell = LS_LSTM, kGates = 4, kUnits = 1, kSaved = 5, kBiases = 4;
};
struct LstmCoupled {
  static constexpr int kCell = LS_LSTM_COUPLED, kGates = 3, kUnits = 1, kSaved = 4, kBiases = 3;
};

/* An LSTM's last three gates are f, g, o, whether i comes before them or not; what it saves ends with c. */
template <class Cell>
struct LstmGates {
  static constexpr bool kLstm = Cell::kCell == LS_LSTM || Cell::kCell == LS_LSTM_COUPLED;
  static constexpr bool kCoupled = Cell::kCell == LS_LSTM_COUPLED;
  static constexpr int kF = Cell::kGates - 3, kG = Cell::kGates - 2, kO = Cell::kGates - 1, kC = Cell::kGates;
};

template <class Cell>
constexpr int panel_vectors() {
  return Cell::kGates * Cell::kUnits;
}

/* Sizes that follow from I and H. */
template <class Cell>
struct Sizes {
  static constexpr int N = panel_vectors<Cell>();
  int64_t I, H;
  int64_t P;            /* width of h: H, or what it is projected to */
  int64_t input_blocks; /* of W columns of x */
  int64_t panels;
  int64_t U; /* unit blocks, those that only fill the last panel included */
  int input_parts, hidden_parts; /* of the factors that W_ih and W_hh are packed as */
  Sizes(int64_t I, int64_t H, int64_t projected = 0, int input_parts = Step::kParts, int hidden_parts = Step::kParts)
      : I(I), H(H), P(projected ? projected : H), input_blocks(ceil_div(I, W)), panels(ceil_div(H, W * Cell::kUnits)),
        U(panels * Cell::kUnits), input_parts(input_parts), hidden_parts(hidden_parts) {}

  /* A packed panel: biases, W_ih, W_hh. The recurrent product skips blocks that are all padding. */
  int64_t bias_floats() const { return Cell::kBiases * Cell::kUnits * W; }
  int64_t unit_blocks() const { return ceil_div(H, W); }
  int64_t hidden_blocks() const { return ceil_div(P, W); } /* of W columns of h */
  int64_t input_floats() const { return factor_floats(input_blocks, input_parts); }
  int64_t hidden_floats() const { return factor_floats(hidden_blocks(), hidden_parts); }
  int64_t panel_floats() const { return bias_floats() + input_floats() + hidden_floats(); }
  int units(int64_t unit_block) const { /* of it that are not padding */
    return part_of(H - unit_block * W);
  }
  int outputs(int64_t block) const { return part_of(P - block * W); } /* columns of a block of h, likewise */

 private:
  static int64_t factor_floats(int64_t blocks, int parts) {
    const bool step = parts == Step::kParts;
    return (step ? Step::padded(blocks) * Step::S : OfChunk::padded(blocks) * OfChunk::S) * N * W;
  }
  static int part_of(int64_t left) { return left > W ? W : left > 0 ? int(left) : 0; }
};

/* Steps in the order in which they are run, and where their rows lie. */
struct Steps {
  const ls_shape& s;
  explicit Steps(const ls_shape& shape) : s(shape), total_(count(shape)) {}
  int64_t time(int64_t step) const { return s.reverse ? s.T - 1 - step : step; }
  int64_t rows(int64_t step) const { return s.counts ? s.counts[time(step)] : s.B; }
  /* Of those, the ones in [row0, row1). */
  int64_t rows_of(int64_t step, int64_t row0, int64_t row1) const { return larger(smaller(rows(step), row1) - row0, 0); }
  int64_t batch_row(int64_t row) const { return s.order ? s.order[row] : row; }
  int64_t offset(int64_t t, int64_t row, int64_t step_stride, int64_t row_stride) const {
    return (s.starts ? s.starts[t] * row_stride : t * step_stride) + batch_row(row) * row_stride;
  }
  /* Whether a row's state is zero before a step; there may be none after the last. */
  bool is_reset(const ls_options& options, int64_t step, int64_t row) const {
    return options.resets && step < s.T && options.resets[time(step) * s.B + batch_row(row)];
  }
  /* The first step that a row has. */
  int64_t first_step(int64_t row) const {
    int64_t step = 0;
    if (s.counts && s.reverse)
      while (step < s.T && rows(step) <= row) ++step;
    return step;
  }
  /* offsets[step]: rows of all steps before it. */
  void count_rows(int64_t* offsets) const {
    int64_t total = 0;
    for (int64_t step = 0; step < s.T; ++step) {
      offsets[step] = total;
      total += rows(step);
    }
  }
  int64_t total_rows() const { return total_; }

  /* begin[i]: the first row of the i-th of `shares` of the batch, which have about as many steps each. Rows lie in falling length. */
  void share_out(int64_t shares, int64_t* begin) const {
    int64_t row = 0, length = s.T, before = 0; /* `before`: steps of all rows before `row` */
    begin[0] = 0;
    for (int64_t i = 1; i <= shares; ++i) {
      if (!s.counts || i == shares) {
        begin[i] = s.B * i / shares;
        continue;
      }
      for (const int64_t wanted = total_ * i / shares; row < s.B; ++row) {
        while (length && s.counts[length - 1] <= row) --length;
        if (!length || 2 * (wanted - before) < length) break;
        before += length;
      }
      begin[i] = row;
    }
  }

 private:
  static int64_t count(const ls_shape& shape) {
    if (!shape.counts) return shape.T * shape.B;
    int64_t total = 0;
    for (int64_t t = 0; t < shape.T; ++t) total += shape.counts[t];
    return total;
  }

  const int64_t total_;
};

/* Zeros where padded rows have no step. */
static inline void clear_past_ends(const Steps& steps, int64_t first, int64_t last, float* p, int64_t step_stride,
                                   int64_t row_stride, int64_t floats) {
  const ls_shape& s = steps.s;
  if (!s.counts || s.starts) return;
  for (int64_t t = first; t < last; ++t)
    for (int64_t row = s.counts[t]; row < s.B; ++row)
      __builtin_memset(p + steps.offset(t, row, step_stride, row_stride), 0, size_t(floats) * sizeof(float));
}

/* What the forward pass saves: [step][group][unit block][row of the group][vectors][W], steps in the order in which they are run,
   and at the end the number of groups of rows. With layer normalisation W_ih x and W_hh h follow the cell's own vectors,
   normalised but without gain, and before that number there are four for every row of every step: the scales of W_ih x and W_hh h,
   and mean and scale of c. */
constexpr int kRowMoments = 4;

template <class Cell>
constexpr int64_t saved_vectors(bool normal) {
  return Cell::kSaved + (normal ? 2 * Cell::kGates : 0);
}

/* Rows of the largest of the shares that begin so. */
static inline int64_t largest_share(const int64_t* begin, int64_t shares) {
  int64_t rows = 0;
  for (int64_t i = 0; i < shares; ++i) rows = larger(rows, begin[i + 1] - begin[i]);
  return rows;
}

/* Where it lies. Teams that divide a batch's rows have a group each, whose rows no other team writes between. */
template <class Cell>
struct Saved {
  int64_t block, row;      /* floats of a unit block of a row, of a row */
  int64_t moments, floats; /* where the four numbers of rows begin, and all */
  int64_t groups, begin[kMostThreads + 1]; /* their first rows */
  Saved(const Sizes<Cell>& sizes, bool normal, int64_t total_rows)
      : block(saved_vectors<Cell>(normal) * W), row(sizes.U * block), moments(total_rows * row),
        floats(moments + (normal ? total_rows * kRowMoments : 0) + 1) {}

  void divide(const Steps& steps, int64_t into) {
    groups = into;
    steps.share_out(groups, begin);
  }

  /* As a forward pass has left it. Whatever else may stand there, nothing beyond `saved` is read. */
  void find(const Steps& steps, const float* saved) {
    const float found = saved ? saved[floats - 1] : 1.0f;
    divide(steps, found >= 1.0f && found <= float(kMostThreads) ? int64_t(found) : 1);
  }

  /* The rows [begin, end) of the batch among which a row is. */
  struct Group {
    int64_t begin, end;
  };
  Group group_of(int64_t of) const {
    int64_t number = 0;
    while (number + 1 < groups && of >= begin[number + 1]) ++number;
    return {begin[number], begin[number + 1]};
  }

  /* A row's unit block in a step of `rows`, where all steps before it have `before`; the row's four numbers. */
  int64_t at(int64_t before, int64_t rows, const Group& group, int64_t unit_block, int64_t of) const {
    const int64_t width = smaller(group.end, rows) - group.begin;
    return (before + group.begin) * row + (unit_block * width + of - group.begin) * block;
  }
  int64_t moments_at(int64_t before, int64_t of) const { return moments + (before + of) * kRowMoments; }
};

/* Whether a call reads the weights as they lie, because packing them would cost more than it saves: few rows, and for a single
   step fewer than rows whose sums over lanes cost as much, of weights whose vectors lie across two lines of the cache fewer
   still. Products of pairs are faster packed. The numbers of rows at which that turns were measured: docs/log.md. */
static inline bool reads_direct(const ls_shape& s, int64_t rows, bool backward) {
  if (backward || s.T > 1) return rows <= 8;
  if (Step::kUnit) return rows <= 12;
  const int64_t P = s.P ? s.P : s.H;
  if ((s.I % W || P % W) && W * rows > 384) return false;
  return (Step::kPair > 1 ? 3 : 1) * W * rows <= 2 * (s.I + P);
}

/* Teams divide a batch's rows, a team's threads its units. */
struct Teams {
  int count, size;
};

/* Whether teams are worth it in which a thread reads `share` kilobytes of weights at each step, of `all`, for `rows` of the batch.
   `stays`: its share with all threads in one team would stay in its second-level cache. `even`: teams have about equally many rows.
   Many rows may read more where that comes from a cache that is near and holds all of it. */
static inline bool pays_to_read(int64_t share, int64_t all, int64_t rows, bool stays, bool even) {
  if (share <= (rows >= 10 ? 2560 : rows >= 5 ? 768 : 192)) return true;
  if (rows >= 32 && !stays && share <= 32 << 10) return true;
  return third_level_is_near() && even && (rows >= 8 ? all <= 14 << 10 : rows >= 4 && share <= 2560);
}

/* Of all work, what one of the teams may have too much where rows have several lengths. */
constexpr double kUneven = 1.0 / 8;

/* Whether teams that divide the rows come out about even: what the slowest has more than its share costs less than `least` of all.
   A step of few rows takes as long as one of kRowsOfAStep. */
static inline bool comes_out_even(const Steps& steps, int64_t teams, double least) {
  int64_t begin[kMostThreads + 1];
  steps.share_out(teams, begin);
  double all = 0, most = 0;
  for (int64_t i = 0; i < teams; ++i) {
    double load = steps.s.counts ? 0.0 : double(begin[i + 1] - begin[i]);
    for (int64_t step = 0; steps.s.counts && step < steps.s.T; ++step) {
      const int64_t rows = steps.rows_of(step, begin[i], begin[i + 1]);
      if (rows) load += double(larger(rows, kRowsOfAStep));
    }
    all += load;
    most = load > most ? load : most;
  }
  return double(teams) * most - all <= least * all;
}

/* How `threads` are best divided, at most `panels` of them in a team. A small team waits less at each step, and passes less from
   core to core, but each of its threads reads more weights for fewer rows. What pays was measured by rows of a team and by
   weights of a thread, with two threads and with sixteen: docs/log.md. `most` teams at most. */
static inline Teams best_teams(const Steps& steps, int64_t threads, int64_t panels, int64_t weights, int64_t most) {
  const ls_shape& s = steps.s;
  threads = smaller(threads, kMostThreads);
  const int64_t largest = smaller(threads, larger(panels, 1));
  if (s.T <= 4) return {1, int(largest)}; /* to read all weights costs more than a few waits */
  const auto kilobytes = [weights](int64_t size) { return weights / size * 4 >> 10; };
  for (int64_t size = 1; size <= smaller(threads / 2, largest); ++size) {
    const int64_t teams = smaller(threads / size, most), rows = steps.total_rows() / (s.T * teams);
    if (rows == 0 || 8 * teams * size < 7 * threads) continue; /* threads would be idle */
    const bool even = s.counts || comes_out_even(steps, teams, 1.0 / 32);
    if (!pays_to_read(kilobytes(size), kilobytes(1), rows, kilobytes(largest) <= 2304, even)) continue;
    if (!s.counts || comes_out_even(steps, teams, kUneven)) return {int(teams), int(size)};
  }
  if (s.counts) return {1, int(largest)};
  /* Threads beyond one for each panel do not make less of six rows: those take as long as their weights need to come. */
  return {int(larger(smaller(smaller(threads / largest, most), s.B / 6), 1)), int(largest)};
}

/* Those of them that are worth it in a call of `flops` operations, where a team waits at each of `steps` steps and all together
   `by_rows` times. */
static inline Teams useful_teams(Teams teams, double flops, double steps, double by_rows) {
  if (teams.count > 1) teams.count = int(larger(useful_threads(teams.count * teams.size, flops, by_rows) / teams.size, 1));
  if (teams.size > 1) teams.size = useful_threads(teams.size, flops / teams.count, steps);
  return teams;
}

/* Ends the process where this library is wrong: memory that was counted too little would be somebody else's. */
static inline void must_be(bool right) {
  if (!right) __builtin_trap();
}

/* Cuts a call's scratch memory into arrays, each on a cache line of its own. Once without memory, to learn how much. */
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory), floats_(0) {}
  float* array(int64_t floats) {
    float* p = next_ ? next_ + floats_ : nullptr;
    floats_ += (floats + 15) / 16 * 16 + 16;
    return p;
  }
  int64_t floats() const { return floats_; }

 private:
  float* next_;
  int64_t floats_;
};

/* Floats between what two teams write: a page, past which no core brings lines ahead that another is writing. Where it brings such
   lines, they go back and forth between the cores' caches, which is slow where these are not near each other: docs/log.md. */
constexpr int64_t kApart = 1024;

/* A thread's own of `all` blocks of W columns: whole panels of a deep product. */
struct Blocks {
  int64_t begin, end;
};

static inline Blocks own_blocks(const Team& team, int64_t all) {
  const int64_t panels = ceil_div(all, kColumns);
  return {smaller(team.begin(panels) * kColumns, all), smaller(team.end(panels) * kColumns, all)};
}

/* Rows that a blocked array has room for: an odd number, so that its blocks do not all fall on the same lines of a cache. */
static inline int64_t odd(int64_t rows) { return rows | 1; }

static inline void clear(float* p, int64_t floats) { __builtin_memset(p, 0, size_t(floats) * sizeof(float)); }

/* What `from` holds, zeros where there is none; into nothing where nobody wants it. */
static inline void copy_or_clear(float* to, const float* from, int64_t floats) {
  if (!to || to == from) return;
  if (from)
    __builtin_memcpy(to, from, size_t(floats) * sizeof(float));
  else
    clear(to, floats);
}

/* panel[k][n W + u] = weight[row(n, u)][k]: W rows of the weights side by side. `rows` of the W are not padding. */
template <class F>
static void transpose_block(const float* weight, int64_t stride, int rows, int64_t K, float* panel, int64_t panel_width) {
  for (int64_t k = 0; k < F::padded(ceil_div(K, W)) * W; k += W) {
    int left = int(smaller(K - k, W));
    V square[W];
    for (int u = 0; u < W; ++u) square[u] = u < rows && left > 0 ? load_part(weight + u * stride + k, left) : V{};
    mirror(square);
    F::store_square(panel + k / F::kPair * panel_width, panel_width, square);
  }
}

template <class Cell>
static void pack_biases(const Sizes<Cell>& sizes, int64_t panel, const float* bias_ih, const float* bias_hh, float* out) {
  for (int unit = 0; unit < Cell::kUnits; ++unit) {
    int64_t block = panel * Cell::kUnits + unit;
    int units = sizes.units(block);
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      int n = gate * Cell::kUnits + unit;
      int64_t row = gate * sizes.H + block * W;
      bool candidate = Cell::kCell == LS_GRU && gate == 2; /* its two biases stay apart: r multiplies one of them */
      V bias = V{}, hidden_bias = V{};
      if (units && bias_ih) bias = load_part(bias_ih + row, units);
      if (units && bias_hh) hidden_bias = load_part(bias_hh + row, units);
      store(out + n * W, candidate ? bias : bias + hidden_bias);
      if (candidate) store(out + 3 * W, hidden_bias);
    }
  }
}

template <class F, class R, class Cell>
static void pack_panel(const Sizes<Cell>& sizes, int64_t panel, const float* weight_ih, const float* weight_hh,
                       const float* bias_ih, const float* bias_hh, float* out) {
  constexpr int N = Sizes<Cell>::N;
  const int64_t I = sizes.I, H = sizes.H, P = sizes.P;
  float* inputs = out + sizes.bias_floats();
  float* hidden = inputs + sizes.input_floats();
  pack_biases<Cell>(sizes, panel, bias_ih, bias_hh, out);
  for (int unit = 0; unit < Cell::kUnits; ++unit) {
    int64_t block = panel * Cell::kUnits + unit;
    int units = sizes.units(block);
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      int n = gate * Cell::kUnits + unit;
      int64_t row = gate * H + block * W;
      transpose_block<F>(weight_ih + (units ? row : 0) * I, I, units, I, inputs + n * F::kWide, N * F::kWide);
      transpose_block<R>(weight_hh + (units ? row : 0) * P, P, units, P, hidden + n * R::kWide, N * R::kWide);
    }
  }
}

/* W rows of a matrix, of which `count` are not padding, as W rows of the panel of `multiply_deep` that begins at `column`. */
template <class F>
static void pack_deep_rows(const float* rows, int count, int64_t columns, int64_t column, float* panel) {
  for (int row = 0; row < W; ++row)
    for (int i = 0; i < kColumns; ++i) {
      int64_t at = column + i * W, valid = row < count ? columns - at : 0;
      V v = valid > 0 ? load_part(rows + row * columns + at, int(smaller(valid, W))) : V{};
      F::store_right(panel + (row / F::kPair * kColumns + i) * F::kWide, row, v);
    }
}

/* The projection of an LSTM's h: P rows of W_hr side by side in panels for `multiply_deep`, behind the other panels. */
template <class R>
struct Projection {
  int64_t H, P; /* P: 0 for none */
  int64_t panels() const { return ceil_div(P, kPanel); }
  int64_t panel_floats() const { return R::padded(ceil_div(H, W)) * R::S * kPanel; }
  int64_t floats() const { return panels() * panel_floats(); }

  void pack(const float* weight_hr, int64_t panel, float* packed) const {
    for (int i = 0; i < kColumns; ++i) {
      int64_t row = panel * kPanel + i * W;
      int rows = int(larger(smaller(P - row, W), 0));
      transpose_block<R>(weight_hr + (rows ? row : 0) * H, H, rows, H, packed + panel * panel_floats() + i * R::kWide,
                         kColumns * R::kWide);
    }
  }
};

/* Block `block` of W columns of a row; zeros where it has none. */
static inline V row_block(const float* row, int64_t columns, int64_t block) {
  const int left = int(smaller(columns - block * W, W));
  return left > 0 ? load_part(row + block * W, left) : V{};
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
