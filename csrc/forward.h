/* The forward pass of one layer in one direction.

   For a chunk of steps the input's share of the gates is computed at once, then the steps one after the other, each
   tile of rows and units from product to new state while its sums are at hand:

     chunk:  x -> blocked copy   | all wait |   xg = bias + x W_ih   (own panels); of symbols xg = bias + rows of a table
     step:   gates = xg + h W_hh -> activations -> c, h, y, saved    (own panels)   | all wait |

   With layer normalisation a row's gates need the whole row, so a step has two parts:

     step:   hg = h W_hh   (own panels)   | all wait |   gates = norm(xg) + norm(hg) -> ... (own rows)   | all wait |

   An LSTM that projects makes h of m = o tanh(c), which is put out otherwise, in one more part:

     step:   ... -> c, m   | all wait |   h = m W_hr -> y   (own columns)   | all wait |

   A team divides the panels; several teams divide the batch's rows and never wait for each other. */

#ifndef LONGSHORT_FORWARD_H
#define LONGSHORT_FORWARD_H

#include "equations.h"
#include "layout.h"
#include "normal.h"

namespace ls {
namespace LS_TARGET {

/* F: the factors of products with x, of a chunk at once. R: of those with h, step by step. */
template <class Cell, class F, class R>
struct Forward {
  using L = LstmGates<Cell>;
  static constexpr int N = panel_vectors<Cell>();
  static constexpr int NW = N * W;
  static constexpr int G = Cell::kGates;
  static constexpr bool kLstm = L::kLstm, kGru = Cell::kCell == LS_GRU;
  static constexpr bool kPartless = F::kPartless;
  static constexpr double kWaitsByRows = 1.0; /* of teams for each other */
  static constexpr int64_t kMostAside = 2304; /* kilobytes of weights with which two directions run side by side */

  const ls_forward_args& a;
  const Steps steps;
  const Sizes<Cell> sizes;
  int64_t T, B, H, P;
  const Projection<R> projection;
  int64_t h_blocks;   /* of W columns of h; where h is not projected those that only fill a panel too */
  int64_t Bp;         /* rows that a team's blocked array of states has room for */
  int threads, teams, team_size;
  int64_t chunk_rows; /* rows of a chunk, over all its steps */
  bool options, raw_differs, normal, projects;
  Saved<Cell> saving;
  bool direct;        /* the weights are read as they lie; h has its rows one after the other then */
  bool passing;       /* a single step: each thread packs its panels one after the other into the same place */
  int64_t h_row, h_block, m_row;
  const float* packed;

  /* Shared scratch. */
  float* memory;
  float* own_packed;
  const float* packed_projection;
  int64_t* row_offset;
  Team::Shared* shared;
  float* of_teams; /* what each has of its own */
  int64_t team_floats;

  /* A team's, for the rows [row0, row1) of the batch. */
  int64_t row0, row1;
  int64_t* partless; /* the last chunk whose x has numbers without parts, by its first step, counted from 1 */
  float* h[2];   /* what W_hh reads, as a left factor, or [row][h_row]: of this step and of the next */
  float* raw[2]; /* h before mask, reset and rounding, [U][Bp][W]; what W_hh reads where there are none */
  float* c;      /* blocked [U][Bp][W] */
  float* m;      /* where h is projected, o tanh(c): as a left factor, or [row][m_row] */
  float* hr;     /* and m W_hr, [block][Bp][W] */
  float* x;      /* a chunk, as a left factor */
  float* xg;     /* a chunk [panel][row][N W] */
  float* hg;     /* with layer normalisation, W_hh h of a step [panel][row][N W] */

  Forward(const ls_forward_args& args)
      : a(args), steps(args.shape), sizes(args.shape.I, args.shape.H, args.shape.P, F::kParts, R::kParts), T(args.shape.T),
        B(args.shape.B), H(args.shape.H), P(sizes.P), projection{H, args.shape.P},
        saving(sizes, args.options.gamma_ih, steps.total_rows()), row0(0), row1(B) {
    const ls_options& o = a.options;
    raw_differs = o.h_mask || o.resets;
    options = raw_differs || o.zoneout_mask || o.zoneout != 0.0f || o.weight_cf;
    normal = o.gamma_ih;
    /* Sums have another order then, so only where no call without gradients must give the same bits. */
    direct = a.saved && !a.packed && reads_direct(a.shape, steps.total_rows(), false);
    raw_differs = raw_differs || (!R::kFloats && !direct);
    projects = kLstm && args.shape.P;
    h_blocks = projects ? sizes.hidden_blocks() : sizes.U;
    h_row = direct ? h_blocks * W + W : W;
    m_row = sizes.U * W + W;
    plan_teams();
    saving.divide(steps, teams);
    const int64_t group = largest_share(saving.begin, teams);
    Bp = odd(group);
    h_block = direct ? W : Bp * W;
    /* Not with parts: where x has numbers without any, all panels' biases are read at once. */
    passing = T == 1 && teams == 1 && !a.packed && !direct && !normal && !a.tokens.table && !kPartless;
    /* xg and x of a chunk should stay in the second-level cache; a matrix unit waits for the weights instead. */
    int64_t row_floats = sizes.panels * NW / team_size + sizes.input_blocks * W;
    int64_t fitting = F::kUnit ? 256 : smaller(larger((512 << 10) / row_floats, 24), 96);
    chunk_rows = larger(larger(group, 1), smaller(steps.total_rows(), fitting));
  }

  int64_t weights_read() const { return sizes.panels * sizes.panel_floats() + projection.floats(); }

  double flops() const {
    const double rows = double(steps.total_rows()), waited_for = rows_waited_for(steps.total_rows(), T);
    const double products = 2.0 * double(H) * (rows * double(G * sizes.I + a.shape.P) + waited_for * double(G * P));
    return a.saved ? products + kFlopsPerUpdatedWeight * double(weights_read()) : products;
  }

  void plan_teams() {
    const int64_t most = larger(smaller(a.shape.num_threads, sizes.panels * larger(B, 1)), 1);
    const Teams best = best_teams(steps, most, sizes.panels, weights_read(), direct ? 1 : most);
    const Teams useful = useful_teams(best, flops(), double(T), kWaitsByRows);
    teams = useful.count;
    team_size = useful.size;
    threads = teams * team_size;
  }

  int64_t carve(float* memory) {
    Arena arena(memory);
    int64_t panels_end = (passing ? team_size : sizes.panels) * sizes.panel_floats();
    int64_t packed_floats = direct ? sizes.panels * sizes.bias_floats() : panels_end + projection.floats();
    own_packed = a.packed ? nullptr : arena.array(packed_floats);
    packed = a.packed ? a.packed : own_packed;
    packed_projection = packed ? packed + panels_end : nullptr;
    row_offset = reinterpret_cast<int64_t*>(arena.array(2 * T));
    partless = kPartless ? reinterpret_cast<int64_t*>(arena.array(2 * teams)) : nullptr;
    shared = reinterpret_cast<Team::Shared*>(arena.array(int64_t(sizeof(Team::Shared) / 4) * (teams + 1)));
    team_floats = carve_team(nullptr);
    of_teams = arena.array(teams * (team_floats + kApart));
    return arena.floats();
  }

  int64_t carve_team(float* memory) {
    Arena arena(memory);
    int64_t state = h_blocks * Bp * W;
    for (int i = 0; i < 2; ++i) h[i] = arena.array(direct ? Bp * h_row : R::left_floats(h_blocks, Bp));
    for (int i = 0; i < 2; ++i) raw[i] = raw_differs ? arena.array(direct ? Bp * h_row : state) : h[i];
    c = kLstm ? arena.array(sizes.U * Bp * W) : nullptr;
    m = projects ? arena.array(direct ? Bp * m_row : R::left_floats(sizes.U, Bp)) : nullptr;
    hr = projects ? arena.array(projection.panels() * kColumns * Bp * W) : nullptr;
    x = direct ? nullptr : arena.array(F::left_floats(sizes.input_blocks, odd(chunk_rows)));
    xg = arena.array(sizes.panels * chunk_rows * NW);
    hg = normal ? arena.array(sizes.panels * Bp * NW) : nullptr;
    return arena.floats();
  }

  /* Whether there are steps; where there are none, does all that is to be done. */
  bool has_steps() {
    if (steps.total_rows()) return true;
    save_groups();
    copy_or_clear(a.h_n, a.h0, B * P);
    if (kLstm) copy_or_clear(a.c_n, a.c0, B * H);
    clear_past_ends(steps, 0, T, a.y, a.y_step, a.y_row, P);
    return false;
  }

  void save_groups() const {
    if (a.saved) a.saved[saving.floats - 1] = float(saving.groups);
  }

  /* False: there is no memory. */
  bool begin() {
    save_groups();
    int64_t floats = carve(nullptr);
    memory = static_cast<float*>(take(size_t(floats) * sizeof(float)));
    if (!memory) return false;
    must_be(carve(memory) == floats && carve_team(of_teams) == team_floats);
    steps.count_rows(row_offset);
    clear(reinterpret_cast<float*>(shared), int64_t(sizeof(Team::Shared) / 4) * (teams + 1));
    if (kPartless) clear(reinterpret_cast<float*>(partless), 2 * teams);
    return true;
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    MatrixUnit unit;
    if (teams == 1) {
      Team team(shared, thread, count);
      if (own_packed) pack(team);
      run_rows(team);
      return;
    }
    Team all(shared + teams, thread, count);
    if (own_packed) pack(all);
    if (!all.wait()) return;
    all.for_teams(shared, teams, [&](const Team& team, int64_t index) {
      Forward own = *this;
      own.row0 = saving.begin[index];
      own.row1 = saving.begin[index + 1];
      if (kPartless) own.partless += index;
      must_be(own.carve_team(of_teams + index * (team_floats + kApart)) == team_floats);
      own.run_rows(team);
    });
    all.wait(); /* to notice whether somebody else has the other cores */
  }

  void pack(const Team& team) {
    for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels) && !passing; ++panel)
      if (direct)
        pack_biases<Cell>(sizes, panel, a.bias_ih, a.bias_hh, own_packed + panel * sizes.bias_floats());
      else
        pack_panel(panel, own_packed + panel * sizes.panel_floats());
    for (int64_t panel = team.begin(projection.panels()); panel < team.end(projection.panels()) && !direct; ++panel)
      projection.pack(a.weight_hr, panel, const_cast<float*>(packed_projection));
  }

  void pack_panel(int64_t panel, float* out) {
    LS_TARGET::pack_panel<F, R, Cell>(sizes, panel, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh, out);
  }

  /* A thread's panels, and where the first of them lies packed; the others lie behind it. */
  struct Own {
    int64_t first, count;
    const float* packed;
  };

  Own own_panels(const Team& team) const {
    const int64_t first = team.begin(sizes.panels);
    return {first, team.end(sizes.panels) - first, packed + first * sizes.panel_floats()};
  }

  /* Packed weights that are read once need not all lie in memory: a panel stays in the core's own cache until its products are
     done, and the next one takes its place. */
  void run_only_step(const Team& team, int64_t rows) {
    float* place = own_packed + team.index() * sizes.panel_floats();
    for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels); ++panel) {
      pack_panel(panel, place);
      multiply_inputs({panel, 1, place}, 0, rows);
      run_step({panel, 1, place}, 0, rows, rows, xg);
    }
  }

  void run_rows(Team team) {
    start_state(team);
    for (int64_t first = 0, last; first < T; first = last) {
      int64_t rows = 0;
      for (last = first; last < T; ++last) {
        int64_t more = steps.rows_of(last, row0, row1);
        if (rows && rows + more > chunk_rows) break;
        rows += more;
      }
      if (a.tokens.table || direct) {
        if (a.tokens.table)
          look_up(team, first, last, rows);
        else
          multiply_inputs_direct(team, first, last, rows);
        if (first == 0 && !team.wait()) return; /* all have made their part of the first state */
      } else {
        copy_inputs(team, first, last, rows);
        if (!team.wait()) return;
        if (passing)
          run_only_step(team, rows);
        else if (kPartless && *partless == first + 1)
          multiply_inputs_direct(team, first, last, rows);
        else
          multiply_inputs(own_panels(team), first, rows);
      }
      int64_t row_in_chunk = 0;
      for (int64_t step = first; step < last; ++step) {
        int64_t n = steps.rows_of(step, row0, row1);
        float* xg_rows = xg + row_in_chunk * NW;
        if (direct)
          run_step_direct(team, step, n, rows, xg_rows);
        else if (!passing)
          run_step(own_panels(team), step, n, rows, xg_rows);
        if (normal) {
          if (!team.wait()) return;
          finish_rows(team, step, n, rows, xg_rows);
        }
        if (projects) {
          if (!team.wait()) return;
          project(team, step, n);
        }
        put_out(team, step, n);
        row_in_chunk += n;
        if (!team.wait()) return;
      }
    }
    finish(team);
  }

  void start_state(const Team& team) {
    for (int64_t block = team.begin(h_blocks); block < team.end(h_blocks); ++block) {
      int columns = sizes.outputs(block);
      for (int64_t row = row0; row < row1; ++row) {
        V start = a.h0 && columns ? load_part(a.h0 + steps.batch_row(row) * P + block * W, columns) : V{};
        V read = options ? seen(start, steps.first_step(row), row, block, columns) : start;
        for (int i = 0; i < 2; ++i) {
          store_h(i, block, row, read);
          if (raw_differs) store(raw[i] + h_at(block, row), start);
        }
      }
    }
    if (team.leads() && !direct) {
      for (float* left : h) R::fill_left(left, h_blocks, Bp, 0, row1 - row0);
      if (projects) R::fill_left(m, sizes.U, Bp, 0, row1 - row0);
    }
    for (int64_t block = team.begin(sizes.U); block < team.end(sizes.U) && kLstm; ++block) {
      int units = sizes.units(block);
      for (int64_t row = row0; row < row1; ++row)
        store(c_at(block, row),
              a.c0 && units ? load_part(a.c0 + steps.batch_row(row) * H + block * W, units) : V{});
    }
  }

  int64_t h_at(int64_t block, int64_t row) const { return block * h_block + (row - row0) * h_row; }
  float* c_at(int64_t block, int64_t row) const { return c + (block * Bp + row - row0) * W; }

  /* What W_hh reads of a row. */
  void store_h(int64_t step, int64_t block, int64_t row, V value) {
    if (R::kFloats || direct)
      store(h[step & 1] + h_at(block, row), value);
    else
      R::store_left(R::left_at(h[step & 1], Bp, block, row - row0), value);
  }

  bool is_reset(int64_t step, int64_t row) const {
    return steps.is_reset(a.options, step, row);
  }

  /* h as W_hh reads it at `step`. */
  V seen(V value, int64_t step, int64_t row, int64_t block, int columns) const {
    if (is_reset(step, row)) return V{};
    if (a.options.h_mask && columns)
      value *= load_part(a.options.h_mask + steps.batch_row(row) * P + block * W, columns);
    return value;
  }

  void copy_inputs(const Team& team, int64_t first, int64_t last, int64_t rows) {
    const int64_t blocks = F::padded(sizes.input_blocks);
    int64_t at = 0;
    for (int64_t step = first; step < last; ++step) {
      int64_t t = steps.time(step), n = steps.rows_of(step, row0, row1);
      for (int64_t row = row0; row < row0 + n; ++row, ++at) {
        const float* from = a.x + steps.offset(t, row, a.x_step, a.x_row);
        for (int64_t block = team.begin(blocks); block < team.end(blocks); ++block) {
          const V v = row_block(from, sizes.I, block);
          if constexpr (kPartless)
            if (!F::have_parts(v)) __atomic_store_n(partless, first + 1, __ATOMIC_RELAXED);
          F::store_left(F::left_at(x, odd(rows), block, at), v);
        }
      }
    }
  }

  /* xg of symbols, own panels. */
  void look_up(const Team& team, int64_t first, int64_t last, int64_t rows) {
    int64_t at = 0;
    for (int64_t step = first; step < last; ++step) {
      const int64_t* ids = a.tokens.ids + steps.time(step) * B;
      for (int64_t row = row0, end = row0 + steps.rows_of(step, row0, row1); row < end; ++row, ++at) {
        const float* from = a.tokens.table + ids[steps.batch_row(row)] * G * H;
        for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels); ++panel)
          for (int n = 0; n < N; ++n) {
            int64_t block = panel * Cell::kUnits + n % Cell::kUnits;
            int units = sizes.units(block);
            V v = units ? load_part(from + n / Cell::kUnits * H + block * W, units) : V{};
            store(xg + (panel * rows + at) * NW + n * W, normal ? v : v + load(biases_of(panel) + n * W));
          }
      }
    }
  }

  void multiply_inputs(const Own& own, int64_t step, int64_t rows) {
    const Depth whole = F::depth_of(sizes.I);
    const int64_t blocks = whole.blocks;
    const int64_t depth = F::kUnit ? max_depth<F>() : larger(blocks, 1); /* a matrix unit reads all rows again for each panel */
    Tiles<F> tiles(rows, max_rows<F, N>());
    for (int64_t k = 0; k == 0 || k < blocks; k += depth) {
      const int64_t deep = smaller(depth, blocks - k);
      Panels panels(own.packed + sizes.bias_floats() + k * F::S * NW, deep * F::S * NW, sizes.panel_floats(), own.count, step);
      for (int64_t i = 0; i < panels.count(); ++i) {
        int64_t panel = own.first + panels.index(i);
        float* biases = normal ? nullptr : const_cast<float*>(own.packed + panels.index(i) * sizes.panel_floats());
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          int64_t row = tiles.begin(tile);
          const Place sums = {xg + (panel * rows + row) * NW, NW, W};
          multiply_rows<F, N>(tiles.size(tile), whole.part(k, deep), F::left_at(x, odd(rows), k, row), odd(rows),
                           panels.at(i), k ? sums : Place{biases, 0, W}, sums, panels.ahead(i, tile, tiles.count, deep));
        }
      }
    }
  }

  void multiply_inputs_direct(const Team& team, int64_t first, int64_t last, int64_t rows) {
    for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels); ++panel) {
      const float* biases = biases_of(panel);
      float* xg_panel = xg + panel * rows * NW;
      for (int64_t row = 0; row < rows; ++row)
        for (int n = 0; n < N; ++n) store(xg_panel + row * NW + n * W, normal ? V{} : load(biases + n * W));
      for (int n = 0; n < N; ++n) {
        int64_t block = panel * Cell::kUnits + n % Cell::kUnits;
        int units = sizes.units(block);
        const float* weight = a.weight_ih + (n / Cell::kUnits * H + block * W) * sizes.I;
        int64_t at = 0;
        for (int64_t step = first; step < last && units; ++step) {
          int64_t n_rows = steps.rows_of(step, row0, row1), t = steps.time(step);
          for (int64_t row = 0; row < n_rows;) {
            const float* from = a.x + steps.offset(t, row0 + row, a.x_step, a.x_row);
            /* Rows of a step lie evenly unless they are put in another order. */
            int count = a.shape.order ? 1 : int(smaller(n_rows - row, kDotRows));
            dot_rows(count, sizes.I, from, a.x_row, weight, sizes.I, units, xg_panel + at * NW + n * W, NW);
            row += count;
            at += count;
          }
        }
      }
    }
  }

  void run_step_direct(const Team& team, int64_t step, int64_t n_rows, int64_t chunk, const float* xg_rows) {
    Tiles<Factors<Floats>> tiles(n_rows, smaller(kDotRows, kAccumulators / N));
    alignas(64) float sums[kAccumulators * W];
    int64_t first = team.begin(sizes.panels), count = team.end(sizes.panels) - first;
    for (int64_t i = 0; i < count; ++i) {
      int64_t panel = first + (step & 1 ? count - 1 - i : i); /* in turns: what was read last is still at hand */
      const float* hidden_bias = biases_of(panel) + 3 * W;
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        int64_t row = tiles.begin(tile);
        int rows = tiles.size(tile);
        const float* xg_tile = xg_rows + (panel * chunk + row) * NW;
        for (int r = 0; r < rows; ++r)
          for (int n = 0; n < N; ++n)
            store(sums + r * NW + n * W,
                  normal ? V{} : load(kGru && n == 2 ? hidden_bias : xg_tile + r * NW + n * W));
        for (int n = 0; n < N; ++n) {
          int64_t block = panel * Cell::kUnits + n % Cell::kUnits;
          int units = sizes.units(block);
          const float* weight = a.weight_hh + (n / Cell::kUnits * H + block * W) * P;
          if (units) dot_rows(rows, P, h[step & 1] + row * h_row, h_row, weight, P, units, sums + n * W, NW);
        }
        if (normal)
          __builtin_memcpy(hg_at(panel, row0 + row), sums, size_t(rows * NW) * sizeof(float));
        else
          finish_tile(step, panel, row0 + row, rows, sums, xg_tile);
      }
    }
  }

  /* `xg_rows`: the step's first row in the chunk's first panel. */
  void run_step(const Own& own, int64_t step, int64_t n, int64_t chunk, const float* xg_rows) {
    const int64_t before_hidden = sizes.bias_floats() + sizes.input_floats();
    const Depth deep = R::depth_of(P);
    Panels panels(own.packed + before_hidden, sizes.hidden_floats(), sizes.panel_floats(), own.count, step);
    Tiles<R> tiles(n, max_rows<R, N>());
    alignas(64) float sums[tile_floats<R, N>()];
    for (int64_t i = 0; i < panels.count(); ++i) {
      int64_t panel = own.first + panels.index(i);
      const float* hidden_bias = own.packed + panels.index(i) * sizes.panel_floats() + 3 * W; /* the GRU's */
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        int64_t row = tiles.begin(tile);
        int rows = tiles.size(tile);
        const float* left = R::left_at(h[step & 1], Bp, 0, row);
        if (normal) {
          multiply_rows<R, N>(rows, deep, left, Bp, panels.at(i), Place{nullptr, 0, 0},
                           Place{hg_at(panel, row0 + row), NW, W}, panels.ahead(i, tile, tiles.count, deep.blocks));
          continue;
        }
        const float* xg_tile = xg_rows + (panel * chunk + row) * NW;
        Place start = {const_cast<float*>(xg_tile), NW, W};
        if (kGru) { /* n starts from its own hidden bias: r multiplies the sum before the input's share is added */
          for (int r = 0; r < rows; ++r) {
            store(sums + r * NW, load(xg_tile + r * NW));
            store(sums + r * NW + W, load(xg_tile + r * NW + W));
            store(sums + r * NW + 2 * W, load(hidden_bias));
          }
          start.p = sums;
        }
        multiply_rows<R, N>(rows, deep, left, Bp, panels.at(i), start, Place{sums, NW, W},
                         panels.ahead(i, tile, tiles.count, deep.blocks));
        finish_tile(step, panel, row0 + row, rows, sums, xg_tile);
      }
    }
  }

  const float* biases_of(int64_t panel) const {
    return packed + panel * (direct ? sizes.bias_floats() : sizes.panel_floats());
  }

  float* hg_at(int64_t panel, int64_t row) const { return hg + (panel * Bp + row - row0) * NW; }

  void finish_tile(int64_t step, int64_t panel, int64_t row, int rows, float* sums, const float* xg_tile) {
    if (options)
      finish_tile_rows<true>(step, panel, row, rows, sums, xg_tile);
    else
      finish_tile_rows<false>(step, panel, row, rows, sums, xg_tile);
  }

  /* From the sums of a tile to the state after the step. */
  template <bool kOptions>
  void finish_tile_rows(int64_t step, int64_t panel, int64_t row, int rows, float* sums, const float* xg_tile) {
    for (int unit = 0; unit < Cell::kUnits; ++unit) {
      int64_t block = panel * Cell::kUnits + unit;
      int units = sizes.units(block);
      float* saved = saved_at(step, block, row);
      if (!units) { /* nothing reads it, but the same calls leave the same bytes */
        if (saved) clear(saved, rows * saving.block);
        continue;
      }
      /* Lanes without a unit are 0 times the input, which is NaN where that is infinite: they must not reach W_hh. */
      if (units < W)
        for (int r = 0; r < rows; ++r)
          for (int n = unit; n < N; n += Cell::kUnits) {
            float* g = sums + r * NW + n * W;
            store(g, first_lanes(load(g), units));
          }
      for (int r = 0; r < rows; ++r) {
        V gates[G], hidden{};
        for (int gate = 0; gate < G; ++gate) gates[gate] = load(sums + r * NW + (gate * Cell::kUnits + unit) * W);
        if constexpr (kGru) {
          hidden = gates[2];
          gates[2] = load_part(xg_tile + r * NW + 2 * W, units);
        }
        V before = kLstm && projects ? V{} : h_before<kOptions>(step, row + r, block);
        V after = run_cell<kOptions>(step, row + r, block, gates, hidden, before, saved);
        if constexpr (kLstm) after = gates[L::kO] * tanh(after);
        if (kLstm && projects)
          store_m(block, row + r, after);
        else
          put<kOptions>(step, row + r, block, units, before, after);
        if (saved) saved += saving.block;
      }
    }
  }

  float* saved_at(int64_t step, int64_t block, int64_t row) const {
    if (!a.saved) return nullptr;
    return a.saved + saving.at(row_offset[step], steps.rows(step), {row0, row1}, block, row);
  }

  template <bool kOptions>
  V h_before(int64_t step, int64_t row, int64_t block) const {
    return kOptions && is_reset(step, row) ? V{} : load(raw[step & 1] + h_at(block, row));
  }

  /* Runs the activations of one row's unit block on its sums. `hidden`: the GRU's W_hn h + b_hn. Gives h after the step; for
     the LSTM c, which is brought forward, and o in its place among the gates. */
  template <bool kOptions>
  V run_cell(int64_t step, int64_t row, int64_t block, V* gates, V hidden, V before, float* saved) {
    if constexpr (kLstm) {
      float* p = c_at(block, row);
      V c_before = kOptions && is_reset(step, row) ? V{} : load(p);
      const ls_options& having = a.options;
      const bool peeps = kOptions && having.weight_cf;
      const int units = sizes.units(block);
      if (peeps && !L::kCoupled) gates[0] += c_before * load_part(having.weight_ci + block * W, units);
      if (peeps) gates[L::kF] += c_before * load_part(having.weight_cf + block * W, units);
      V c_after = lstm_c<Cell>(gates, c_before);
      if (peeps) gates[L::kO] += c_after * load_part(having.weight_co + block * W, units);
      gates[L::kO] = sigmoid(gates[L::kO]);
      store(p, c_after);
      if (saved) {
        for (int gate = 0; gate < G; ++gate) store(saved + gate * W, gates[gate]);
        store(saved + L::kC * W, c_after);
      }
      return c_after;
    } else if constexpr (kGru) {
      V after = gru_h(gates, hidden, before);
      if (saved) {
        for (int gate = 0; gate < G; ++gate) store(saved + gate * W, gates[gate]);
        store(saved + G * W, hidden);
      }
      return after;
    } else {
      V after = rnn_h<Cell>(gates[0]);
      if (saved) store(saved, after);
      return after;
    }
  }

  void store_m(int64_t block, int64_t row, V value) {
    if (direct)
      store(m + (row - row0) * m_row + block * W, value);
    else
      R::store_left(R::left_at(m, Bp, block, row - row0), value);
  }

  /* h = m W_hr of a step, own columns. */
  void project(const Team& team, int64_t step, int64_t n) {
    int64_t first = team.begin(projection.panels()), last = team.end(projection.panels());
    if (!direct) /* in ascending order of k at every step, as all products that a forward pass makes */
      multiply_deep<R>(packed_projection, R::depth_of(H), first, last, R::left_at(m, Bp, 0, 0), Bp, n, 0,
                    Place{hr, W, Bp * W}, kColumns * Bp * W);
    for (int64_t block = first * kColumns; block < smaller(last * kColumns, h_blocks); ++block) {
      float* sums = hr + block * Bp * W;
      const int columns = sizes.outputs(block);
      if (direct) {
        clear(sums, n * W);
        for (int64_t row = 0; row < n; row += kDotRows)
          dot_rows(int(smaller(n - row, kDotRows)), H, m + row * m_row, m_row, a.weight_hr + block * W * H, H,
                   columns, sums + row * W, W);
      }
      for (int64_t row = 0; row < n; ++row)
        if (options)
          put<true>(step, row0 + row, block, columns, h_before<true>(step, row0 + row, block), load(sums + row * W));
        else
          put<false>(step, row0 + row, block, columns, V{}, load(sums + row * W));
    }
  }

  /* Hands on what a step made of h. */
  template <bool kOptions>
  void put(int64_t step, int64_t row, int64_t block, int columns, V before, V after) {
    if constexpr (kOptions) {
      const ls_options& o = a.options;
      V zoneout = splat(o.zoneout);
      if (o.zoneout_mask)
        zoneout = load_part(o.zoneout_mask + (steps.time(step) * B + steps.batch_row(row)) * P + block * W, columns);
      after = after + zoneout * (before - after);
      if (raw_differs) store(raw[(step + 1) & 1] + h_at(block, row), after);
      store_h(step + 1, block, row, seen(after, step + 1, row, block, columns));
    } else {
      if constexpr (!R::kFloats) store(raw[(step + 1) & 1] + h_at(block, row), after);
      store_h(step + 1, block, row, after);
    }
  }

  /* What this thread made of h in a step. */
  void put_out(const Team& team, int64_t step, int64_t n) {
    if (projects)
      put_out(step, row0, row0 + n, team.begin(projection.panels()) * kColumns, team.end(projection.panels()) * kColumns);
    else if (normal)
      put_out(step, row0 + team.begin(n), row0 + team.end(n), 0, h_blocks);
    else
      put_out(step, row0, row0 + n, team.begin(sizes.panels) * Cell::kUnits, team.end(sizes.panels) * Cell::kUnits);
  }

  /* Blocks of what a step made, to where it goes: row by row, each from end to end, since others write the rows beside. */
  void put_out(int64_t step, int64_t first_row, int64_t last_row, int64_t first_block, int64_t last_block) {
    last_block = smaller(last_block, sizes.hidden_blocks());
    for (int64_t row = first_row; row < last_row; ++row) {
      float* to = a.y + steps.offset(steps.time(step), row, a.y_step, a.y_row);
      const float* from = raw[(step + 1) & 1] + h_at(0, row);
      for (int64_t block = first_block; block < last_block; ++block)
        store_part(to + block * W, load(from + block * h_block), sizes.outputs(block));
    }
  }

  /* Own rows of a step whose products are ready, with layer normalisation. */
  void finish_rows(const Team& team, int64_t step, int64_t n, int64_t chunk, float* xg_rows) {
    for (int64_t row = team.begin(n); row < team.end(n); ++row)
      if (options)
        finish_row<true>(step, row0 + row, chunk * NW, xg_rows + row * NW);
      else
        finish_row<false>(step, row0 + row, chunk * NW, xg_rows + row * NW);
  }

  /* One row: its shares of the gates from input and state lie in panels `x_panel` and Bp N W floats apart. */
  template <bool kOptions>
  void finish_row(int64_t step, int64_t row, int64_t x_panel, const float* x_gates) {
    const ls_options& o = a.options;
    const int64_t h_panel = Bp * NW;
    float* h_gates = hg_at(0, row);
    Moments of_x = moments<Cell, N>(sizes, x_gates, x_panel), of_h = moments<Cell, N>(sizes, h_gates, h_panel), of_c{};
    for (int64_t panel = 0; panel < sizes.panels; ++panel)
      for (int unit = 0; unit < Cell::kUnits; ++unit) {
        int64_t block = panel * Cell::kUnits + unit;
        int units = sizes.units(block);
        float* saved = saved_at(step, block, row);
        if (!units) {
          if (saved) clear(saved, saving.block);
          continue;
        }
        const float* biases = biases_of(panel);
        V gates[G], hidden{};
        for (int gate = 0; gate < G; ++gate) {
          int n = gate * Cell::kUnits + unit;
          int64_t at = gate * H + block * W;
          V x_hat = of_x.normalise(load(x_gates + panel * x_panel + n * W));
          V h_hat = of_h.normalise(load(h_gates + panel * h_panel + n * W));
          if (saved) {
            store(saved + (Cell::kSaved + gate) * W, x_hat);
            store(saved + (Cell::kSaved + G + gate) * W, h_hat);
          }
          V from_x = x_hat * load_part(o.gamma_ih + at, units) + load(biases + n * W);
          V from_h = h_hat * load_part(o.gamma_hh + at, units);
          if (kGru && gate == 2) {
            gates[gate] = from_x;
            hidden = from_h + load(biases + 3 * W);
          } else {
            gates[gate] = from_x + from_h;
          }
        }
        V before = kLstm ? V{} : h_before<kOptions>(step, row, block);
        V after = run_cell<kOptions>(step, row, block, gates, hidden, before, saved);
        if constexpr (kLstm)
          store(h_gates + panel * h_panel, gates[L::kO]); /* the output waits for the whole row's c */
        else
          put<kOptions>(step, row, block, units, before, after);
      }
    if constexpr (kLstm) {
      const float* c_row = c_at(0, row);
      of_c = moments<Cell, 1>(sizes, c_row, Bp * W);
      for (int64_t block = 0; block < sizes.panels; ++block) {
        int units = sizes.units(block);
        V c_hat = of_c.normalise(load(c_row + block * Bp * W));
        V read = c_hat * load_part(o.gamma_c + block * W, units) + load_part(o.beta_c + block * W, units);
        V after = load(h_gates + block * h_panel) * tanh(read);
        if (projects)
          store_m(block, row, after);
        else
          put<kOptions>(step, row, block, units, h_before<kOptions>(step, row, block), after);
      }
    }
    if (a.saved) {
      float* to = a.saved + saving.moments_at(row_offset[step], row);
      to[0] = of_x.scale;
      to[1] = of_h.scale;
      to[2] = of_c.mean;
      to[3] = of_c.scale;
    }
  }

  /* States after the last steps, and zeros past the ends. */
  void finish(const Team& team) {
    const ls_shape& s = a.shape;
    for (int64_t block = team.begin(sizes.hidden_blocks()); block < team.end(sizes.hidden_blocks()) && a.h_n; ++block) {
      int64_t run = T; /* steps that a row has run */
      for (int64_t row = row0; row < row1; ++row) {
        if (s.counts && !s.reverse)
          while (run && s.counts[run - 1] <= row) --run;
        float* to = a.h_n + steps.batch_row(row) * P + block * W;
        store_part(to, load(raw[run & 1] + h_at(block, row)), sizes.outputs(block));
      }
    }
    for (int64_t block = team.begin(sizes.unit_blocks()); block < team.end(sizes.unit_blocks()) && kLstm && a.c_n; ++block)
      for (int64_t row = row0; row < row1; ++row)
        store_part(a.c_n + steps.batch_row(row) * H + block * W, load(c_at(block, row)), sizes.units(block));
    if (row1 == B) clear_past_ends(steps, team.begin(T), team.end(T), a.y, a.y_step, a.y_row, P);
  }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
