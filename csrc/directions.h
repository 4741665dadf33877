/* The passes over the two directions of a layer, which do not need each other: one after the other in all threads, or side by
   side in half of them each. Side by side is faster where threads that divide a direction's units would wait for each other at
   each step, or where a direction is too little work for all of them. */

#ifndef LONGSHORT_DIRECTIONS_H
#define LONGSHORT_DIRECTIONS_H

#include "backward.h"
#include "forward.h"

namespace ls {
namespace LS_TARGET {

/* Pass: Forward or Backward; Args: what it reads. */
template <class Pass>
static int32_t run_alone(Pass& pass) {
  if (!pass.has_steps()) return LS_OK;
  if (!pass.begin()) return LS_OUT_OF_MEMORY;
  parallel(
      pass.threads, pass.a.shape.num_threads,
      [](void* context, int thread, int count) { static_cast<Pass*>(context)->work(thread, count); }, &pass);
  give(pass.memory);
  return LS_OK;
}

/* Whether two directions may be faster side by side than one after the other, `alone` being the first of these. */
template <class Pass>
static bool may_go_side_by_side(const Pass& alone) {
  const ls_shape& s = alone.a.shape;
  const int64_t threads = s.num_threads, rows = alone.steps.total_rows();
  if (rows == 0 || 8 * 2 * (threads / 2) < 7 * threads) return false; /* threads would be idle */
  if (useful_threads(2, 2.0 * alone.flops(), Pass::kWaitsByRows) < 2) return false;
  /* Threads that divide rows wait for nobody; but few rows take as long as their half. */
  const bool divides_rows = alone.team_size == 1 && 2 * alone.teams > threads;
  return !divides_rows || rows < kRowsOfAStep * s.T * alone.teams;
}

/* The gradient of x, to which both directions add: the second has its own first, as (T, B, I), or with `starts` as x lies. */
static inline int64_t rows_of_input(const ls_shape& s) {
  if (!s.starts) return s.T * s.B;
  int64_t rows = 0;
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t count = s.counts ? s.counts[t] : s.B;
    if (count) rows = larger(rows, s.starts[t] + (s.order ? s.B : count));
  }
  return rows;
}

static inline int64_t floats_apart(const ls_forward_args&) { return 0; }
static inline int64_t floats_apart(const ls_backward_args& a) {
  return a.dx && a.accumulate_dx ? rows_of_input(a.shape) * a.shape.I : 0;
}

static inline void write_apart(ls_forward_args&, float*) {}
static inline void write_apart(ls_backward_args& a, float* dx) {
  a.dx = dx;
  a.dx_step = a.shape.B * a.shape.I;
  a.dx_row = a.shape.I;
  a.accumulate_dx = 0;
}

static inline void add_apart(const Team&, const ls_forward_args&, const ls_forward_args&) {}
static inline void add_apart(const Team& team, const ls_backward_args& to, const ls_backward_args& from) {
  const Steps steps(to.shape);
  for (int64_t step = team.begin(to.shape.T); step < team.end(to.shape.T); ++step) {
    const int64_t t = steps.time(step), rows = steps.rows(step);
    for (int64_t row = 0; row < rows; ++row) {
      float* sum = to.dx + steps.offset(t, row, to.dx_step, to.dx_row);
      const float* more = from.dx + steps.offset(t, row, from.dx_step, from.dx_row);
      for (int64_t i = 0; i < to.shape.I; i += W) {
        const int count = int(smaller(to.shape.I - i, W));
        store_part(sum + i, load_part(sum + i, count) + load_part(more + i, count), count);
      }
    }
  }
}

template <class Pass, class Args>
struct SideBySide {
  const Args* given;
  Args args[2]; /* with half of the threads each */
  Pass passes[2];
  int64_t apart = 0; /* floats of the second's gradient of x, where it has its own first */
  Team::Shared shared[3] = {};

  explicit SideBySide(const Args* given)
      : given(given), args{halved(given[0]), halved(given[1])}, passes{Pass(args[0]), Pass(args[1])} {}

  static Args halved(Args args) {
    args.shape.num_threads /= 2;
    return args;
  }

  bool pays() const {
    if (passes[0].threads != passes[1].threads) return false; /* of one direction fewer gradients are wanted */
    if (given->shape.starts && rows_of_input(given->shape) > 2 * passes[0].steps.total_rows()) return false; /* it has gaps */
    /* The weights that a thread reads at each step stay in its core's second-level cache, or nearly. */
    return passes[0].weights_read() / passes[0].team_size * 4 >> 10 <= Pass::kMostAside;
  }

  /* LS_OUT_OF_MEMORY: nothing has been done. */
  int32_t run() {
    apart = floats_apart(args[1]);
    float* memory = apart ? static_cast<float*>(take(size_t(apart) * sizeof(float))) : nullptr;
    if (apart && !memory) return LS_OUT_OF_MEMORY;
    if (apart) write_apart(args[1], memory);
    const bool begun = passes[0].begin(), both = begun && passes[1].begin();
    if (both)
      parallel(
          2 * passes[0].threads, given->shape.num_threads,
          [](void* context, int thread, int count) { static_cast<SideBySide*>(context)->work(thread, count); }, this);
    if (both) give(passes[1].memory);
    if (begun) give(passes[0].memory);
    give(memory);
    return both ? LS_OK : LS_OUT_OF_MEMORY;
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    Team all(shared + 2, thread, count);
    all.for_teams(shared, 2, [&](const Team& team, int64_t index) { passes[index].work(team.index(), team.count()); });
    if (all.wait() && apart) add_apart(all, given[1], args[1]);
  }
};

/* One direction, or two. */
template <class Pass, class Args>
static int32_t run_directions(const Args* args, int32_t count) {
  Pass first(args[0]);
  if (count == 2 && may_go_side_by_side(first)) {
    SideBySide<Pass, Args> both(args);
    if (both.pays() && both.run() == LS_OK) return LS_OK;
  }
  const int32_t status = run_alone(first);
  if (status || count == 1) return status;
  Pass second(args[1]);
  return run_alone(second);
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
