/* What a forward pass has saved, laid out to be looked at. */

#ifndef LONGSHORT_GATES_H
#define LONGSHORT_GATES_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

/* Of the vectors that are saved, the first so many are shown: not what the GRU's n is made of, and of an RNN none, as its only
   one is y. */
template <class Cell>
constexpr int shown_vectors() {
  return LstmGates<Cell>::kLstm ? Cell::kGates + 1 : Cell::kCell == LS_GRU ? 3 : 0;
}

/* gates[vector][t][row of the batch][H]; 0 where a row has no step. */
template <class Cell>
static void lay_out_gates(const ls_shape& s, bool normal, const float* saved, float* gates) {
  const Steps steps(s);
  const Sizes<Cell> sizes(s.I, s.H);
  Saved<Cell> saving(sizes, normal, steps.total_rows());
  saving.find(steps, saved);
  const int64_t whole = s.T * s.B * s.H;
  int64_t rows_before = 0;
  for (int64_t step = 0; step < s.T; ++step) {
    float* of_step = gates + steps.time(step) * s.B * s.H;
    int64_t n = steps.rows(step);
    for (int64_t row = 0; row < s.B; ++row) {
      float* to = of_step + steps.batch_row(row) * s.H;
      const auto group = saving.group_of(row);
      for (int vector = 0; vector < shown_vectors<Cell>(); ++vector, to += whole)
        for (int64_t block = 0; block < sizes.unit_blocks(); ++block) {
          V value{};
          if (row < n) value = load(saved + saving.at(rows_before, n, group, block, row) + vector * W);
          store_part(to + block * W, value, sizes.units(block));
        }
    }
    rows_before += n;
  }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
