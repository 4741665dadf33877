/* The gradients of a layer's weights, a chunk of steps at a time: what reached the gates, times what the weights multiplied.

     dW_ih += dgates^T x, or with symbols rows of the table += dgates     dW_hh += dgates^T h     db += sum of dgates
     dW_hr += dh^T m, of an LSTM that projects m = o tanh(c)

   A team divides the weights' rows; what they multiplied is copied once for all, own columns. Teams that divide the batch's
   rows have a sum each, to be added up at the end. */

#ifndef LONGSHORT_WEIGHTS_H
#define LONGSHORT_WEIGHTS_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

/* What is summed over all rows. */
enum Summed { kWeightIh, kWeightHh, kWeightHr, kBiasIh, kBiasHh, kTable, kSums };

/* Where such a sum goes; p NULL: it is not wanted. */
struct Sum {
  float* p;
  int64_t floats;
};

template <class Cell, class F>
struct WeightGradients {
  using O = Outer<F>;
  using L = LstmGates<Cell>;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t kGroup = (128 << 10); /* floats of dgates that meet all columns of the weights at a time */
  static constexpr int64_t kNear = (64 << 10);   /* floats of x or h that stay in the core's own cache meanwhile */

  const ls_backward_args& a;
  const Steps& steps;
  const Sizes<Cell>& sizes;
  const Saved<Cell>& saving;
  const int64_t I, H, P, U;
  const bool normal;
  Sum sums[kSums];

  float* x_columns; /* the chunk's x, its h before each step, its m: [panel of columns][row][vectors W] */
  float* h_columns;
  float* m_columns;
  int64_t* symbols;   /* of the chunk's rows, with a table */
  float* right;       /* where factors are not floats, gradients as they are multiplied, by `store_rows` */
  float* right_input;
  float* dh_right;

  WeightGradients(const ls_backward_args& args, const Steps& steps, const Sizes<Cell>& sizes, const Saved<Cell>& saving)
      : a(args), steps(steps), sizes(sizes), saving(saving), I(sizes.I), H(sizes.H), P(sizes.P), U(sizes.unit_blocks()),
        normal(args.options.gamma_ih),
        sums{{args.dweight_ih, G * H * I},
             {args.dweight_hh, G * H * P},
             {L::kLstm && args.shape.P ? args.dweight_hr : nullptr, P * H},
             {normal ? nullptr : args.dbias_ih, G * H}, /* with layer normalisation among the sums of vectors */
             {normal ? nullptr : args.dbias_hh, G * H},
             {args.dtable, (args.tokens.V + 1) * G * H}} {}

  void carve(Arena& arena, int64_t chunk_rows) {
    const bool two = Cell::kCell == LS_GRU || normal; /* sets of dgates */
    const bool of_projection = sums[kWeightHr].p;
    x_columns = sums[kWeightIh].p ? arena.array(O::floats(I, chunk_rows)) : nullptr;
    h_columns = sums[kWeightHh].p ? arena.array(O::floats(P, chunk_rows)) : nullptr;
    m_columns = of_projection ? arena.array(O::floats(H, chunk_rows)) : nullptr;
    symbols = sums[kTable].p ? reinterpret_cast<int64_t*>(arena.array(2 * chunk_rows)) : nullptr;
    const int64_t most = O::group_floats(chunk_rows);
    right = !F::kFloats ? arena.array(U * G * most) : nullptr;
    right_input = !F::kFloats && two ? arena.array(U * G * most) : right;
    dh_right = !F::kFloats && of_projection ? arena.array(sizes.hidden_blocks() * most) : nullptr;
  }

  /* Adds to arrays of its own instead, one after the other. */
  void sum_apart(float* p) {
    for (Sum& sum : sums) {
      if (!sum.p) continue;
      sum.p = p;
      p += ceil_div(sum.floats, W) * W;
    }
  }

  /* What the weights' gradients multiply dgates with: x, and h before each step; and dh with: m. Of the rows [row0, row1). */
  void copy(const Team& team, int64_t first, int64_t last, int64_t row0, int64_t row1, int64_t rows,
            const int64_t* row_offset) {
    int64_t at = 0;
    for (int64_t step = first; step < last; ++step) {
      int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
      for (int64_t row = row0, end = smaller(row1, steps.rows(step)); row < end; ++row, ++at) {
        if (symbols && team.leads()) symbols[at] = a.tokens.ids[steps.time(step) * steps.s.B + steps.batch_row(row)];
        if (x_columns)
          copy_row(team, a.x + steps.offset(steps.time(step), row, a.x_step, a.x_row), nullptr, I, at, rows, x_columns);
        if (m_columns) copy_m(team, step, row, at, rows, row_offset[step]);
        if (!h_columns) continue;
        const float* h = nullptr;
        if (!steps.is_reset(a.options, step, row)) {
          if (row < n_before)
            h = a.y + steps.offset(steps.time(step - 1), row, a.y_step, a.y_row);
          else if (a.h0)
            h = a.h0 + steps.batch_row(row) * P;
        }
        const float* mask = a.options.h_mask ? a.options.h_mask + steps.batch_row(row) * P : nullptr;
        copy_row(team, h, mask, P, at, rows, h_columns);
      }
    }
    fill(team, I, rows, x_columns);
    fill(team, H, rows, m_columns);
    fill(team, P, rows, h_columns);
  }

  static void fill(const Team& team, int64_t columns, int64_t rows, float* out) {
    const int64_t panels = O::panels(columns);
    if (out) O::fill_columns(columns, rows, team.begin(panels), team.end(panels), out);
  }

  /* Own panels of one row. */
  static void copy_row(const Team& team, const float* from, const float* mask, int64_t columns, int64_t at, int64_t rows,
                       float* out) {
    int64_t panels = O::panels(columns);
    O::store_columns(from, mask, columns, at, rows, team.begin(panels), team.end(panels), out);
  }

  /* Own panels of m of one row. */
  void copy_m(const Team& team, int64_t step, int64_t row, int64_t at, int64_t rows, int64_t rows_before) {
    const ls_options& o = a.options;
    const float* moments = a.saved + saving.moments_at(rows_before, row);
    const auto group = saving.group_of(row);
    int64_t panels = O::panels(H);
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      int vectors = O::vectors_at(panel * O::kColumns, H);
      float* to = O::place(m_columns, rows, panel, at, vectors);
      for (int i = 0; i < vectors; ++i) {
        const int64_t block = panel * O::kVectors + i;
        const int units = sizes.units(block);
        const float* of_block = a.saved + saving.at(rows_before, steps.rows(step), group, block, row);
        V read = load(of_block + L::kC * W);
        if (normal)
          read = (read - moments[2]) * moments[3] * load_part(o.gamma_c + block * W, units) +
                 load_part(o.beta_c + block * W, units);
        F::store_right(to + i * F::kWide, at, first_lanes(load(of_block + L::kO * W) * tanh(read), units));
      }
    }
  }

  /* Own units' rows of dW_ih, dW_hh and of the biases, own rows of dW_hr. `dg`, `dg_input`: what reached W_hh h and W_ih x,
     [(unit block, gate)][row of the chunk][W]; `dh`: what reached the projection, [block][row of the chunk][W]. `more`: is
     added to what earlier chunks gave. */
  void add(const Team& team, int64_t rows, const float* dg, const float* dg_input, const float* dh, bool more) {
    const Blocks own = own_blocks(team, U);
    const float* of_h = !F::kFloats ? right : dg;
    const float* of_x = !F::kFloats ? right_input : dg_input;
    int64_t group = larger(kGroup / (G * W * rows), 1);
    for (int64_t block = own.begin; block < own.end; block += group) {
      int64_t end = smaller(block + group, own.end);
      if (sums[kTable].p) add_to_table(block, end, dg_input, rows, more);
      if (x_columns || h_columns) turn_rows(block * G, end * G, dg, rows, right);
      if (x_columns && dg_input != dg) turn_rows(block * G, end * G, dg_input, rows, right_input);
      if (x_columns) outer_columns(block, end, of_x, rows, x_columns, I, sums[kWeightIh].p, more);
      if (h_columns) outer_columns(block, end, of_h, rows, h_columns, P, sums[kWeightHh].p, more);
    }
    if (m_columns) {
      const Blocks outputs = own_blocks(team, sizes.hidden_blocks());
      turn_rows(outputs.begin, outputs.end, dh, rows, dh_right);
      const float* factors = !F::kFloats ? dh_right : dh;
      const auto group = [&](int64_t block) {
        return OuterRows{factors + block * right_rows(rows), sums[kWeightHr].p + block * W * H, sizes.outputs(block)};
      };
      multiply_groups(outputs.begin, outputs.end, group, rows, m_columns, O::kColumns, H, more);
    }
    if (sums[kBiasIh].p) sum_rows(own, dg_input, rows, sums[kBiasIh].p, more);
    if (sums[kBiasHh].p) sum_rows(own, dg, rows, sums[kBiasHh].p, more);
  }

  /* The table's gradient: each row of dgates to the row of its symbol. */
  void add_to_table(int64_t first, int64_t last, const float* dg_input, int64_t rows, bool more) {
    const int64_t width = G * H;
    for (int64_t block = first; block < last; ++block) {
      int units = sizes.units(block);
      for (int gate = 0; gate < G; ++gate) {
        float* column = sums[kTable].p + gate * H + block * W;
        for (int64_t symbol = 0; symbol <= a.tokens.V && !more; ++symbol) store_part(column + symbol * width, V{}, units);
        const float* from = dg_input + (block * G + gate) * odd(rows) * W;
        for (int64_t row = 0; row < rows; ++row) {
          float* p = column + symbols[row] * width;
          store_part(p, load_part(p, units) + load(from + row * W), units);
        }
      }
    }
  }

  /* Floats that the rows of a chunk take in the factor that is made of gradients. */
  static int64_t right_rows(int64_t rows) { return F::kFloats ? odd(rows) * W : O::group_floats(rows); }

  /* Gradients, [.][row of the chunk][W], as that factor, where it is another. */
  static void turn_rows(int64_t first, int64_t last, const float* gradients, int64_t rows, float* factors) {
    for (int64_t i = first; !F::kFloats && i < last; ++i)
      F::store_rows(gradients + i * odd(rows) * W, rows, factors + i * right_rows(rows));
  }

  void outer_columns(int64_t first, int64_t last, const float* gradients, int64_t rows, const float* operands,
                     int64_t columns, float* weight, bool more) {
    const bool near = rows * columns <= kNear; /* then rows of the gradient are written from end to end */
    const auto group = [&](int64_t i) {
      const int64_t block = i / G, gate = i % G;
      return OuterRows{gradients + i * right_rows(rows), weight + (gate * H + block * W) * columns, sizes.units(block)};
    };
    multiply_groups(first * G, last * G, group, rows, operands, near ? columns : O::kColumns, columns, more);
  }

  /* Products of groups of rows of the gradients, `group` says which, with the columns, a stripe of them after the other. */
  template <class Group>
  static void multiply_groups(int64_t first, int64_t last, Group group, int64_t rows, const float* operands, int64_t stripe,
                              int64_t columns, bool more) {
    for (int64_t begin = 0; begin < columns; begin += stripe)
      for (int64_t i = first; i < last; i += O::kGroups) {
        OuterRows of[O::kGroups] = {};
        for (int at = 0; at < O::kGroups && i + at < last; ++at) of[at] = group(i + at);
        O::multiply_stripe(rows, of, operands, begin, begin + stripe, columns, more);
      }
  }

  void sum_rows(Blocks own, const float* gradients, int64_t rows, float* bias, bool more) {
    for (int64_t block = own.begin; block < own.end; ++block) {
      int units = sizes.units(block);
      for (int gate = 0; gate < G; ++gate) {
        const float* from = gradients + (block * G + gate) * odd(rows) * W;
        V sum[4] = {};
        for (int64_t row = 0; row < rows; ++row) sum[row % 4] += load(from + row * W);
        V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float* to = bias + gate * H + block * W;
        store_part(to, more ? load_part(to, units) + total : total, units);
      }
    }
  }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
