/* The backward pass of one layer in one direction: backpropagation through time.

   For a chunk of steps, from the last to the first:

     step:   dh = dy + dgates(next step) W_hh -> dgates, dc                  (own units)   | all wait |
     chunk:  dx = dgates W_ih (own columns);  dW_ih += dgates^T x, or with symbols rows of the table += dgates,
             dW_hh += dgates^T h,  db += sum of dgates  (own units)

   dgates are the gradients before the activations. The GRU has two sets: its candidate's input and hidden share differ by
   the factor r. A team divides units. Several teams divide the batch's rows, each with sums of its own for the weights' gradients,
   and never wait for each other before these are added up. With layer normalisation a step's dgates need the whole row: a
   team divides rows for them, and all wait once more. Of an LSTM that projects h, dh is of what is put out, and one more
   product leads to the cell:

     step:   dh   (own columns)   | all wait |   dm = dh W_hr -> dgates, dc   (own units)   | all wait |
     chunk:  dW_hr += dh^T m   (own columns) */

#ifndef LONGSHORT_BACKWARD_H
#define LONGSHORT_BACKWARD_H

#include "layout.h"
#include "normal.h"
#include "weights.h"

namespace ls {
namespace LS_TARGET {

/* F: the factors of products of a chunk at once, which give dx and the gradients of weights. R: of those step by step. */
template <class Cell, class F, class R>
struct Backward {
  using L = LstmGates<Cell>;
  using Group = typename Saved<Cell>::Group;
  static constexpr int G = Cell::kGates;
  static constexpr bool kLstm = L::kLstm, kGru = Cell::kCell == LS_GRU;
  static constexpr bool kOther = F::kParts != R::kParts; /* dx needs other factors than the step before */
  static constexpr double kWaitsByRows = 2.0; /* of teams for each other */
  static constexpr int64_t kMostAside = 1280; /* kilobytes of weights with which two directions run side by side */

  const ls_backward_args& a;
  const Steps steps;
  const Sizes<Cell> sizes;
  int64_t T, B, I, H, P;
  int64_t Bp;             /* rows that a team's blocked array of states has room for */
  int threads, teams, team_size;
  int64_t first_rows[kMostThreads + 1]; /* of each team */
  int64_t chunk_rows;     /* of a team */
  int64_t U;              /* unit blocks, without those that are all padding */
  int64_t h_blocks;       /* of W columns of h */
  int64_t unit_panels, hidden_panels, input_panels; /* of units, and of columns of h and of x */
  bool options;           /* whether there is anything beside the plain layer; gradients of gates too */
  bool has_direct, normal, peeps, projects;
  Saved<Cell> saving;
  bool direct_weights;    /* they are read as they lie; `recurrent` has its rows one after the other then */
  bool passing;           /* a single step: each thread packs its panels one after the other into the same place */
  int64_t r_row, m_row, r_block;

  /* Shared scratch. */
  float* memory;
  int64_t* row_offset;
  float* packed_hidden;   /* [panel][(unit block, gate, unit)][kColumns W] */
  float* packed_inputs;
  float* packed_projection; /* [panel of units][column of h][kColumns W] */
  float* parts;           /* sums for gradients of vectors, one a thread that was planned, [.][kParts][U][W]; NULL: none */
  float* of_teams;        /* what each has of its own */
  float* sums;            /* of each team but the first, which has the gradients themselves */
  int64_t team_floats, sum_floats;
  Team::Shared* shared;

  /* A team's, for the rows [row0, row1) of the batch. */
  int64_t row0, row1;
  float* recurrent;       /* dgates W_hh, blocked [unit block][row][W] */
  float* direct;          /* what reaches h past W_hh: GRU's z, zoneout */
  float* dm;              /* where h is projected, dh W_hr, blocked as `recurrent` */
  float* dc;
  float* dg;              /* what reached W_hh h: blocked, [(unit block, gate)][row of the chunk][W] */
  float* dg_input;        /* what reached W_ih x; the same but for the GRU and layer normalisation */
  float* left;            /* dg as a left factor; itself if factors are floats */
  float* left_input;
  float* dh_rows;         /* where h is projected: of what a step puts out, [block][row of the chunk][W], */
  float* dh_left;         /* and as a left factor */
  float* dx;              /* [panel][row of the chunk][kPanel] */
  WeightGradients<Cell, F> weights;

  Backward(const ls_backward_args& args)
      : a(args), steps(args.shape), sizes(args.shape.I, args.shape.H, args.shape.P), T(args.shape.T), B(args.shape.B),
        I(args.shape.I), H(args.shape.H), P(sizes.P), U(sizes.unit_blocks()), h_blocks(sizes.hidden_blocks()),
        saving(sizes, args.options.gamma_ih, steps.total_rows()), row0(0), row1(B),
        weights(args, steps, sizes, saving) {
    const ls_options& o = a.options;
    saving.find(steps, a.saved);
    peeps = o.weight_cf;
    options = o.h_mask || o.resets || o.zoneout_mask || o.zoneout != 0.0f || peeps || a.dgates;
    normal = o.gamma_ih;
    projects = kLstm && args.shape.P;
    has_direct = kGru || o.zoneout_mask || o.zoneout != 0.0f;
    direct_weights = reads_direct(a.shape, steps.total_rows(), true);
    r_row = direct_weights ? h_blocks * W + W : W;
    m_row = direct_weights ? U * W + W : W;
    unit_panels = ceil_div(U, kColumns);
    hidden_panels = ceil_div(h_blocks, kColumns);
    input_panels = ceil_div(sizes.input_blocks, kColumns);
    plan_teams();
    passing = T == 1 && teams == 1 && !direct_weights;
    int64_t fitting = (1 << 20) / (U * G * W); /* 4 MB of dgates */
    steps.share_out(teams, first_rows);
    const int64_t group = larger(largest_share(first_rows, teams), 1), all = teams > 1 ? T * group : steps.total_rows();
    Bp = odd(group);
    r_block = direct_weights ? W : Bp * W;
    chunk_rows = larger(group, smaller(all, smaller(larger(fitting, 64), 512)));
  }

  int64_t weights_read() const { return hidden_panels * panel_floats<R>() + input_panels * panel_floats<F>(); }

  double flops() const {
    const double rows = double(steps.total_rows()), waited_for = rows_waited_for(steps.total_rows(), T);
    const double products = 4.0 * rows * double(H) * double(G * (I + P) + a.shape.P) + 2.0 * (waited_for - rows) * double(H * G * P);
    return products + kFlopsPerUpdatedWeight * double(H * G * (I + P));
  }

  void plan_teams() {
    sum_floats = 0;
    for (const Sum& sum : weights.sums)
      if (sum.p) sum_floats += ceil_div(sum.floats, W) * W;
    /* Adding up must cost less than it costs to exchange dgates, of which products of pairs take half. */
    const int64_t most = 1 + (direct_weights ? 0 : steps.total_rows() * G * H / larger(R::kPair * sum_floats, 1));
    const Teams best = best_teams(steps, larger(a.shape.num_threads, 1), unit_panels, weights_read(), most);
    const Teams useful = useful_teams(best, flops(), double(T), kWaitsByRows);
    teams = useful.count;
    team_size = useful.size;
    threads = teams * team_size;
  }

  int64_t carve(float* memory) {
    Arena arena(memory);
    packed_hidden = reaches_back() && !direct_weights ? arena.array(places<R>(hidden_panels)) : nullptr;
    packed_inputs = a.dx && !direct_weights ? arena.array(places<F>(input_panels)) : nullptr;
    packed_projection = projects && !direct_weights ? arena.array(unit_panels * R::padded(h_blocks) * R::S * kPanel) : nullptr;
    parts = normal || peeps ? arena.array(threads * part_floats()) : nullptr;
    sums = teams > 1 ? arena.array((teams - 1) * sum_floats) : nullptr;
    row_offset = reinterpret_cast<int64_t*>(arena.array(2 * T));
    shared = reinterpret_cast<Team::Shared*>(arena.array(int64_t(sizeof(Team::Shared) / 4) * (teams + 1)));
    team_floats = carve_team(nullptr);
    of_teams = arena.array(teams * (team_floats + kApart));
    return arena.floats();
  }

  /* Blocks of W gates, with those that only fill up where products sum over them. */
  template <class K>
  int64_t gate_blocks() const {
    return K::depth_of(H, G).blocks;
  }
  template <class K>
  int64_t panel_floats() const {
    return gate_blocks<K>() * K::S * kPanel;
  }
  template <class K>
  int64_t places(int64_t panels) const {
    return (passing ? threads : panels) * panel_floats<K>();
  }

  int64_t carve_team(float* memory) {
    Arena arena(memory);
    const int64_t state = hidden_panels * kColumns * Bp * W, of_units = unit_panels * kColumns * Bp * W;
    recurrent = arena.array(direct_weights ? Bp * r_row : state);
    direct = has_direct ? arena.array(state) : nullptr;
    dc = kLstm ? arena.array(of_units) : nullptr;
    dm = projects ? arena.array(direct_weights ? Bp * m_row : of_units) : nullptr;
    dg = arena.array(U * G * odd(chunk_rows) * W);
    const bool two = kGru || normal; /* sets of dgates */
    dg_input = two ? arena.array(U * G * odd(chunk_rows) * W) : dg;
    left = dg;
    left_input = dg_input;
    if (!direct_weights) {
      if (!R::kFloats) left = arena.array(R::left_floats(U * G, odd(chunk_rows)));
      if (!F::kFloats) left_input = two || kOther ? arena.array(F::left_floats(U * G, odd(chunk_rows))) : left;
    }
    dh_rows = dh_left = projects ? arena.array(h_blocks * odd(chunk_rows) * W) : nullptr;
    if (projects && !R::kFloats && !direct_weights) dh_left = arena.array(R::left_floats(h_blocks, odd(chunk_rows)));
    dx = a.dx && !direct_weights ? arena.array(input_panels * chunk_rows * kPanel) : nullptr;
    weights.carve(arena, chunk_rows);
    return arena.floats();
  }

  /* Whether there are steps; where there are none, does all that is to be done. */
  bool has_steps() {
    if (steps.total_rows() == 0) no_steps();
    return steps.total_rows() != 0;
  }

  /* False: there is no memory. */
  bool begin() {
    int64_t floats = carve(nullptr);
    memory = static_cast<float*>(take(size_t(floats) * sizeof(float)));
    if (!memory) return false;
    must_be(carve(memory) == floats && carve_team(of_teams) == team_floats);
    steps.count_rows(row_offset);
    clear(reinterpret_cast<float*>(shared), int64_t(sizeof(Team::Shared) / 4) * (teams + 1));
    return true;
  }

  void no_steps() {
    copy_or_clear(a.dh0, a.dh_n, B * P);
    copy_or_clear(a.dc0, a.dc_n, B * H);
    copy_or_clear(a.dweight_ih, nullptr, G * H * I);
    if (a.tokens.ids) copy_or_clear(a.dtable, nullptr, (a.tokens.V + 1) * G * H);
    copy_or_clear(a.dweight_hh, nullptr, G * H * P);
    copy_or_clear(a.dweight_hr, nullptr, a.shape.P * H);
    copy_or_clear(a.dbias_ih, nullptr, G * H);
    copy_or_clear(a.dbias_hh, nullptr, G * H);
    copy_or_clear(a.dgamma_ih, nullptr, G * H);
    copy_or_clear(a.dgamma_hh, nullptr, G * H);
    copy_or_clear(a.dgamma_c, nullptr, H);
    copy_or_clear(a.dbeta_c, nullptr, H);
    copy_or_clear(a.dweight_ci, nullptr, H);
    copy_or_clear(a.dweight_cf, nullptr, H);
    copy_or_clear(a.dweight_co, nullptr, H);
    if (a.dx && !a.accumulate_dx) clear_past_ends(steps, 0, T, a.dx, a.dx_step, a.dx_row, I);
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    MatrixUnit unit;
    Team all(shared + teams, thread, count);
    pack(all);
    for (int64_t share = all.begin(threads); share < all.end(threads) && parts; ++share)
      clear(parts + share * part_floats(), part_floats());
    if ((parts || teams > 1) && !all.wait()) return;
    if (teams == 1) {
      if (!run_rows(all, parts)) return;
    } else {
      all.for_teams(shared, teams, [&](Team& team, int64_t index) {
        Backward own = *this;
        own.row0 = first_rows[index];
        own.row1 = first_rows[index + 1];
        must_be(own.carve_team(of_teams + index * (team_floats + kApart)) == team_floats);
        if (index) own.weights.sum_apart(sums + (index - 1) * sum_floats);
        float* own_parts = parts ? parts + index * team_size * part_floats() : nullptr;
        own.run_rows(team, own_parts);
      });
      if (!all.wait()) return;
      add_up(all);
    }
    if (parts) sum_parts(all);
    if (a.dx && !a.accumulate_dx) clear_past_ends(steps, all.begin(T), all.end(T), a.dx, a.dx_step, a.dx_row, I);
  }

  void pack(const Team& team) {
    for (int64_t panel = team.begin(hidden_panels); panel < team.end(hidden_panels) && packed_hidden && !passing; ++panel)
      pack_columns<R>(a.weight_hh, P, panel, packed_hidden + panel * panel_floats<R>());
    for (int64_t panel = team.begin(input_panels); panel < team.end(input_panels) && packed_inputs && !passing; ++panel)
      pack_columns<F>(a.weight_ih, I, panel, packed_inputs + panel * panel_floats<F>());
    for (int64_t panel = team.begin(unit_panels); panel < team.end(unit_panels) && packed_projection; ++panel)
      for (int64_t block = 0; block < R::padded(h_blocks); ++block)
        pack_deep_rows<R>(a.weight_hr + block * W * H, sizes.outputs(block), H, panel * kPanel,
                       packed_projection + (panel * R::padded(h_blocks) + block) * R::S * kPanel);
  }

  /* All steps of the team's rows, the last first. False: this thread has nothing more to do. */
  bool run_rows(Team& team, float* own_parts) {
    bool add = false;
    start_state(team);
    if (normal && !team.wait()) return false; /* which divides rows; else each reads only what it has made, until its next wait */
    for (int64_t last = T, first; last > 0; last = first) {
      Rows rows{row0, row1, 0, 0};
      for (first = last; first > 0; --first) {
        int64_t more = steps.rows_of(first - 1, row0, row1);
        if (first < last && rows.all + more > chunk_rows) break;
        rows.all += more;
      }
      weights.copy(team, first, last, row0, row1, rows.all, row_offset);
      if (team.leads() && !direct_weights) fill_factors(rows.all);
      rows.at = rows.all;
      for (int64_t step = last - 1; step >= first; --step) {
        rows.end = row0 + steps.rows_of(step, row0, row1);
        rows.at -= rows.count();
        if (projects) {
          reach_outputs(team, step, rows);
          if (!team.wait()) return false;
          multiply_projection(team, step, rows);
          if (normal && !team.wait()) return false;
        }
        if (normal)
          run_step_normal(team, step, rows, own_parts);
        else
          run_step(team, step, rows, own_parts);
        if (!team.wait()) return false;
        if (reaches_back(step)) multiply_step(team, step, rows);
        if (normal && !team.wait()) return false;
      }
      rows.end = row1;
      if (a.dx && direct_weights)
        input_gradients_direct(team, first, last, rows);
      else if (a.dx)
        input_gradients(team, first, last, rows);
      weights.add(team, rows.all, dg, dg_input, dh_rows, add);
      add = true;
      if (!team.wait()) return false;
    }
    return true;
  }

  /* The blocks of left factors that only fill up. */
  void fill_factors(int64_t rows) const {
    R::fill_left(left, U * G, odd(rows), 0, rows);
    if (left_input != left) F::fill_left(left_input, U * G, odd(rows), 0, rows);
    if (projects) R::fill_left(dh_left, h_blocks, odd(rows), 0, rows);
  }

  /* Whether anybody asks what goes back past a step, past any step. */
  bool reaches_back(int64_t step) const { return step > 0 || a.dh0; }
  bool reaches_back() const { return reaches_back(T - 1); }

  /* Rows of a step. */
  struct Rows {
    int64_t begin, end;
    int64_t at;  /* where in its chunk the first of them is */
    int64_t all; /* rows of the chunk */
    int64_t count() const { return end - begin; }
    int64_t place(int64_t row) const { return (at + row - begin) * W; } /* of a row in a blocked array of the chunk */
    int64_t next() const { return odd(all) * W; }                       /* from one block of such an array to the next */
  };

  /* The teams' sums into the gradients, own share of each. */
  void add_up(const Team& team) {
    const float* from = sums;
    for (const Sum& sum : weights.sums) {
      if (!sum.p) continue;
      const int64_t vectors = ceil_div(sum.floats, W);
      for (int64_t i = team.begin(vectors); i < team.end(vectors); ++i) {
        const int lanes = int(smaller(sum.floats - i * W, W));
        V total = load_part(sum.p + i * W, lanes);
        for (int64_t other = 0; other + 1 < teams; ++other) total += load(from + other * sum_floats + i * W);
        store_part(sum.p + i * W, total, lanes);
      }
      from += vectors * W;
    }
  }

  /* panel[(unit block, gate, u)][kColumns W] = weight[gate H + unit][columns]: the order of k in which dgates lie. */
  template <class K>
  void pack_columns(const float* weight, int64_t columns, int64_t panel, float* out) const {
    for (int64_t block = 0; block < U; ++block)
      for (int gate = 0; gate < G; ++gate, out += K::S * kPanel)
        pack_deep_rows<K>(weight + (gate * H + block * W) * columns, sizes.units(block), columns, panel * kPanel, out);
    for (int64_t block = U * G; block < gate_blocks<K>(); ++block, out += K::S * kPanel)
      pack_deep_rows<K>(weight, 0, columns, panel * kPanel, out);
  }

  /* Own blocks of units, and of columns of h. */
  Blocks own_units(const Team& team) const { return own_blocks(team, U); }
  Blocks own_outputs(const Team& team) const { return own_blocks(team, h_blocks); }

  /* Gradients of the states after the last steps; of rows without any step they are those of the states before. */
  void start_state(const Team& team) {
    for (int64_t block = own_outputs(team).begin; block < own_outputs(team).end; ++block) {
      int columns = sizes.outputs(block);
      for (int64_t row = row0; row < row1; ++row) {
        int64_t from = steps.batch_row(row) * P + block * W;
        V d = a.dh_n ? load_part(a.dh_n + from, columns) : V{};
        store(recurrent + r_at(block, row), d);
        if (has_direct) store(direct + state_at(block, row), V{});
        if (a.dh0) store_part(a.dh0 + from, d, columns);
      }
    }
    for (int64_t block = own_units(team).begin; block < own_units(team).end && kLstm; ++block) {
      int units = sizes.units(block);
      for (int64_t row = row0; row < row1; ++row) {
        int64_t from = steps.batch_row(row) * H + block * W;
        V d = a.dc_n ? load_part(a.dc_n + from, units) : V{};
        store(dc + state_at(block, row), d);
        if (a.dc0) store_part(a.dc0 + from, d, units);
      }
    }
  }

  /* The gradients of what a step puts out, own columns, as the products that follow read them. */
  void reach_outputs(const Team& team, int64_t step, const Rows& rows) {
    for (int64_t block = own_outputs(team).begin; block < own_outputs(team).end; ++block) {
      const Units u = {step, steps.time(step), block, 0, sizes.outputs(block), 0, 0, nullptr, nullptr};
      for (int64_t row = rows.begin; row < rows.end; ++row)
        put<R>(dh_rows, dh_left, rows, block, row, options ? reach<true>(u, row) : reach<false>(u, row));
    }
  }

  /* dm = dh W_hr, own units. */
  void multiply_projection(const Team& team, int64_t step, const Rows& rows) {
    if (!direct_weights) {
      multiply_deep<R>(packed_projection, R::depth_of(P), team.begin(unit_panels), team.end(unit_panels),
                       R::left_at(dh_left, odd(rows.all), 0, rows.at), odd(rows.all), rows.count(), step,
                       Place{dm, W, Bp * W}, kColumns * Bp * W);
      return;
    }
    int64_t column = own_units(team).begin * W, columns = smaller(own_units(team).end * W, H) - column;
    multiply_rows_direct(rows, dm, m_row, column, columns, dh_rows, Factors{a.weight_hr, P, H, 1});
  }

  /* Where a row's block is in a team's arrays: of what reaches h, of states. */
  int64_t r_at(int64_t block, int64_t row) const { return block * r_block + (row - row0) * r_row; }
  int64_t state_at(int64_t block, int64_t row) const { return (block * Bp + row - row0) * W; }

  bool is_reset(int64_t step, int64_t row) const {
    return steps.is_reset(a.options, step, row);
  }

  /* A block of units (or of columns of h) in one step, from a row on as far as its group goes; what the forward pass saved of it
     in this step and the one before. */
  struct Units {
    int64_t step, time, block, n_before;
    int count;
    int64_t row, block_floats;
    const float* saved;
    const float* before;
    const float* saved_of(int64_t of) const { return saved + (of - row) * block_floats; }
    const float* saved_before(int64_t of) const { return before + (of - row) * block_floats; }
  };

  Units units_at(int64_t step, int64_t block, int64_t row, const Group& group) const {
    const int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
    const float* before = row < n_before ? a.saved + saving.at(row_offset[step - 1], n_before, group, block, row) : nullptr;
    const float* saved = a.saved + saving.at(row_offset[step], steps.rows(step), group, block, row);
    return {step, steps.time(step), block, n_before, sizes.units(block), row, saving.block, saved, before};
  }

  /* dh -> dgates of one step, own units. */
  void run_step(const Team& team, int64_t step, const Rows& rows, float* own_parts) {
    if (options)
      run_step_rows<true>(team, step, rows, own_parts);
    else
      run_step_rows<false>(team, step, rows, own_parts);
  }

  template <bool kOptions>
  void run_step_rows(const Team& team, int64_t step, const Rows& rows, float* own_parts) {
    const Blocks own = own_units(team);
    for (int64_t first = rows.begin, last; first < rows.end; first = last) {
      const Group group = saving.group_of(first);
      last = smaller(group.end, rows.end);
      for (int64_t block = own.begin; block < own.end; ++block)
        run_step_block<kOptions>(units_at(step, block, first, group), last, rows, own_parts);
    }
  }

  /* A unit block of the rows from u.row to `last`. */
  template <bool kOptions>
  void run_step_block(const Units& u, int64_t last, const Rows& rows, float* own_parts) {
    for (int64_t row = u.row; row < last; ++row) {
      V gates[G], input[G]; /* their gradients */
      V d = of_output<kOptions>(u, row);
      if constexpr (kLstm) {
        const float* g = u.saved_of(row);
        V o = load(g + L::kO * W), tanh_c = tanh(load(g + L::kC * W));
        V dc_row = load(dc + state_at(u.block, row)) + d * o * (1.0f - tanh_c * tanh_c);
        gates[L::kO] = with_shown<kOptions>(d * tanh_c, u, row, L::kO) * o * (1.0f - o);
        differentiate_lstm<kOptions>(u, row, dc_row, gates, own_parts);
      } else {
        differentiate<kOptions>(u, row, d, gates, input);
      }
      for (int gate = 0; gate < G; ++gate) {
        put<R>(dg, left, rows, u.block * G + gate, row, gates[gate]);
        if (kGru)
          put<F>(dg_input, left_input, rows, u.block * G + gate, row, input[gate]);
        else if (kOther && a.dx)
          put<F>(dg, left_input, rows, u.block * G + gate, row, gates[gate]);
      }
    }
  }

  /* Block `block` of a row's gradients, and the factor that is made of it. */
  template <class K>
  void put(float* gradients, float* factors, const Rows& rows, int64_t block, int64_t row, V v) const {
    store(gradients + block * rows.next() + rows.place(row), v);
    if constexpr (!K::kFloats)
      if (!direct_weights) K::store_left(K::left_at(factors, odd(rows.all), block, rows.at + row - rows.begin), v);
  }

  /* The gradient `d` of a gate (of the LSTM kC is c), and what reaches it from whoever looked at it. */
  template <bool kOptions>
  V with_shown(V d, const Units& u, int64_t row, int gate) const {
    if (!kOptions || !a.dgates) return d;
    return d + load_part(a.dgates + ((gate * T + u.time) * B + steps.batch_row(row)) * H + u.block * W, u.count);
  }

  /* The gradient of what a step's cell made of h. With zoneout a share goes to h before it, past the cell: into `direct`, to
     which the GRU adds its own. */
  template <bool kOptions>
  V reach(const Units& u, int64_t row) {
    const int64_t state = state_at(u.block, row);
    V d = load(recurrent + r_at(u.block, row));
    if (has_direct) d += load(direct + state);
    if (a.dy) d += load_part(a.dy + steps.offset(u.time, row, a.dy_step, a.dy_row) + u.block * W, u.count);
    V before{};
    if constexpr (kOptions) {
      if (a.options.zoneout_mask || a.options.zoneout != 0.0f) {
        V zoneout = splat(a.options.zoneout);
        if (a.options.zoneout_mask)
          zoneout = load_part(a.options.zoneout_mask + (u.time * B + steps.batch_row(row)) * P + u.block * W, u.count);
        before = zoneout * d;
        d -= before;
      }
    }
    if (has_direct) store(direct + state, kOptions && is_reset(u.step, row) ? V{} : before);
    return d;
  }

  /* The gradient of what the cell of a step makes: of h, or of m where that is projected. */
  template <bool kOptions>
  V of_output(const Units& u, int64_t row) {
    if (kLstm && projects) return load(dm + u.block * r_block + (row - row0) * m_row);
    return reach<kOptions>(u, row);
  }

  /* Of i, f, g from those of c and o; that of c goes on to the step before. */
  template <bool kOptions>
  void differentiate_lstm(const Units& u, int64_t row, V dc_row, V* gates, float* own_parts) {
    int64_t to = steps.batch_row(row) * H + u.block * W;
    bool reset = kOptions && is_reset(u.step, row);
    const float* saved = u.saved_of(row);
    V f = load(saved + L::kF * W), g = load(saved + L::kG * W), i = L::kCoupled ? 1.0f - f : load(saved);
    V c_before = row < u.n_before ? load(u.saved_before(row) + L::kC * W)
                 : a.c0           ? load_part(a.c0 + to, u.count)
                                  : V{};
    if (reset) c_before = V{};
    dc_row = with_shown<kOptions>(dc_row, u, row, L::kC);
    const bool looks = kOptions && peeps;
    if (looks) {
      dc_row += gates[L::kO] * peephole(a.options.weight_co, u);
      add_to(part(own_parts, 4, 4, u.block), gates[L::kO] * load(saved + L::kC * W));
    }
    if (!L::kCoupled) gates[0] = with_shown<kOptions>(dc_row * g, u, row, 0) * i * (1.0f - i);
    V df = L::kCoupled ? dc_row * (c_before - g) : dc_row * c_before;
    gates[L::kF] = with_shown<kOptions>(df, u, row, L::kF) * f * (1.0f - f);
    gates[L::kG] = with_shown<kOptions>(dc_row * i, u, row, L::kG) * (1.0f - g * g);
    V dc_before = dc_row * f;
    if (looks) {
      dc_before += gates[L::kF] * peephole(a.options.weight_cf, u);
      add_to(part(own_parts, 4, 3, u.block), gates[L::kF] * c_before);
      if (!L::kCoupled) dc_before += gates[0] * peephole(a.options.weight_ci, u);
      if (!L::kCoupled) add_to(part(own_parts, 4, 2, u.block), gates[0] * c_before);
    }
    if (reset) dc_before = V{};
    store(dc + state_at(u.block, row), dc_before);
    if (a.dc0 && row >= u.n_before) store_part(a.dc0 + to, dc_before, u.count);
  }

  static V peephole(const float* weight, const Units& u) { return load_part(weight + u.block * W, u.count); }

  /* Of the gates from that of h: as W_hh h sees them, and for the GRU as W_ih x does. */
  template <bool kOptions>
  void differentiate(const Units& u, int64_t row, V dh, V* gates, V* input) {
    const float* saved = u.saved_of(row);
    if constexpr (kGru) {
      bool reset = kOptions && is_reset(u.step, row);
      V r = load(saved), z = load(saved + W), n = load(saved + 2 * W), hidden = load(saved + 3 * W);
      V before = reset ? V{} : h_before(u.step, row, u.n_before, u.block, u.count);
      V dn = with_shown<kOptions>(dh * (1.0f - z), u, row, 2) * (1.0f - n * n);
      gates[0] = input[0] = with_shown<kOptions>(dn * hidden, u, row, 0) * r * (1.0f - r);
      gates[1] = input[1] = with_shown<kOptions>(dh * (before - n), u, row, 1) * z * (1.0f - z);
      gates[2] = dn * r;
      input[2] = dn;
      float* to = direct + state_at(u.block, row);
      if (!reset) store(to, load(to) + dh * z);
    } else {
      V y = load(saved);
      gates[0] = Cell::kCell == LS_RNN_TANH ? dh * (1.0f - y * y) : (y > 0.0f ? dh : V{});
    }
  }

  /* The same with layer normalisation, own shares of the rows. There are as many as threads were planned, so that which rows
     are summed up together does not depend on how many came. */
  void run_step_normal(const Team& team, int64_t step, const Rows& rows, float* own_parts) {
    const int64_t shares = team_size, n = rows.count();
    for (int64_t share = team.begin(shares); share < team.end(shares); ++share)
      for (int64_t row = rows.begin + n * share / shares; row < rows.begin + n * (share + 1) / shares; ++row)
        if (options)
          run_row_normal<true>(step, row, rows, own_parts + share * part_floats());
        else
          run_row_normal<false>(step, row, rows, own_parts + share * part_floats());
  }

  /* Of each gate gamma_ih, gamma_hh, bias_ih, bias_hh; of the LSTM gamma_c, beta_c, and the peepholes of i, f, o. */
  static constexpr int kParts = 4 * G + 5;
  int64_t part_floats() const { return kParts * U * W; }

  float* part(float* own_parts, int kind, int gate, int64_t block) const { return own_parts + ((kind * G + gate) * U + block) * W; }

  template <bool kOptions>
  void run_row_normal(int64_t step, int64_t row, const Rows& rows, float* own_parts) {
    const ls_options& o = a.options;
    const float* m = a.saved + saving.moments_at(row_offset[step], row);
    const Group group = saving.group_of(row);
    const int64_t next = rows.next(), place = rows.place(row);
    Through of_x, of_h, of_c;
    if constexpr (kLstm) {
      for (int64_t block = 0; block < U; ++block) {
        const Units u = units_at(step, block, row, group);
        const float* saved = u.saved_of(row);
        V of_m = of_output<kOptions>(u, row);
        V c_hat = (load(saved + L::kC * W) - m[2]) * m[3], gamma = load_part(o.gamma_c + block * W, u.count);
        V tanh_c = tanh(c_hat * gamma + load_part(o.beta_c + block * W, u.count)), gate = load(saved + L::kO * W);
        V d = of_m * gate * (1.0f - tanh_c * tanh_c);
        float* out = dg + block * G * next + place;
        store(out, d * gamma); /* until the whole row's are known */
        store(out + L::kO * next, with_shown<kOptions>(of_m * tanh_c, u, row, L::kO) * gate * (1.0f - gate));
        of_c.add(d * gamma, c_hat);
        add_to(part(own_parts, 4, 0, block), d * c_hat);
        add_to(part(own_parts, 4, 1, block), d);
      }
      of_c.close(H, m[3]);
    }
    for (int64_t block = 0; block < U; ++block) {
      const Units u = units_at(step, block, row, group);
      const float* saved = u.saved_of(row);
      float* out = dg + block * G * next + place;
      float* out_input = dg_input + block * G * next + place;
      V gates[G], input[G];
      if constexpr (kLstm) {
        V dc_row = load(dc + state_at(block, row)) + of_c(load(out), (load(saved + L::kC * W) - m[2]) * m[3]);
        gates[L::kO] = load(out + L::kO * next);
        differentiate_lstm<kOptions>(u, row, dc_row, gates, own_parts);
      } else {
        differentiate<kOptions>(u, row, of_output<kOptions>(u, row), gates, input);
      }
      for (int gate = 0; gate < G; ++gate) {
        if (!kGru) input[gate] = gates[gate];
        int64_t unit = gate * H + block * W;
        V x_hat = load(saved + (Cell::kSaved + gate) * W), h_hat = load(saved + (Cell::kSaved + G + gate) * W);
        V dx_hat = input[gate] * load_part(o.gamma_ih + unit, u.count);
        V dh_hat = gates[gate] * load_part(o.gamma_hh + unit, u.count);
        add_to(part(own_parts, 0, gate, block), input[gate] * x_hat);
        add_to(part(own_parts, 1, gate, block), gates[gate] * h_hat);
        add_to(part(own_parts, 2, gate, block), input[gate]);
        if (kGru) add_to(part(own_parts, 3, gate, block), gates[gate]);
        of_x.add(dx_hat, x_hat);
        of_h.add(dh_hat, h_hat);
        store(out_input + gate * next, dx_hat);
        store(out + gate * next, dh_hat);
      }
    }
    of_x.close(G * H, m[0]);
    of_h.close(G * H, m[1]);
    for (int64_t block = 0; block < U; ++block) {
      const float* saved = units_at(step, block, row, group).saved + Cell::kSaved * W;
      for (int gate = 0; gate < G; ++gate) {
        const int64_t of = block * G + gate, to = of * next + place;
        put<F>(dg_input, left_input, rows, of, row, of_x(load(dg_input + to), load(saved + gate * W)));
        put<R>(dg, left, rows, of, row, of_h(load(dg + to), load(saved + (G + gate) * W)));
      }
    }
  }

  static void add_to(float* p, V v) { store(p, load(p) + v); }

  /* The gradients of vectors, own units, from all parts: with layer normalisation gains and biases; peepholes. */
  void sum_parts(const Team& team) {
    for (int64_t block = own_units(team).begin; block < own_units(team).end; ++block) {
      int units = sizes.units(block);
      for (int gate = 0; normal && gate < G; ++gate) {
        float* of[] = {a.dgamma_ih, a.dgamma_hh, a.dbias_ih, a.dbias_hh};
        for (int kind = 0; kind < 4; ++kind)
          if (of[kind]) sum_part(of[kind] + gate * H + block * W, kind == 3 && !kGru ? 2 : kind, gate, block, units);
      }
      float* of_units[] = {a.dgamma_c, a.dbeta_c, a.dweight_ci, a.dweight_cf, a.dweight_co};
      for (int i = normal ? 0 : 2; i < (peeps ? 5 : 2); ++i)
        if (kLstm && of_units[i]) sum_part(of_units[i] + block * W, 4, i, block, units);
    }
  }

  void sum_part(float* to, int kind, int gate, int64_t block, int units) {
    V sum{};
    for (int share = 0; share < threads; ++share) sum += load(part(parts + share * part_floats(), kind, gate, block));
    store_part(to, sum, units);
  }

  /* h before a step: what the step before it put out, or h0. */
  V h_before(int64_t step, int64_t row, int64_t n_before, int64_t block, int units) const {
    if (row < n_before)
      return load_part(a.y + steps.offset(steps.time(step - 1), row, a.y_step, a.y_row) + block * W, units);
    return a.h0 ? load_part(a.h0 + steps.batch_row(row) * H + block * W, units) : V{};
  }

  /* dgates, a left factor of `rows`, `n` of them, times a matrix: own panels of it. */
  template <class K>
  void multiply_gates(const Team& team, float* packed, const float* weight, int64_t columns, int64_t panels, float* from,
                      int64_t rows, int64_t n, int64_t turn, const Place& out, int64_t out_panel) const {
    if (!passing) {
      multiply_deep<K>(packed, K::depth_of(H, G), team.begin(panels), team.end(panels), from, odd(rows), n, turn, out,
                       out_panel);
      return;
    }
    float* place = packed + team.index() * panel_floats<K>();
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      pack_columns<K>(weight, columns, panel, place);
      multiply_deep<K>(place, K::depth_of(H, G), 0, 1, from, odd(rows), n, turn,
                       Place{out.p + panel * out_panel, out.row, out.vector}, out_panel);
    }
  }

  /* recurrent = dgates W_hh for the step before, own units. */
  void multiply_step(const Team& team, int64_t step, const Rows& rows) {
    int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
    if (direct_weights)
      multiply_step_direct(team, rows);
    else
      multiply_gates<R>(team, packed_hidden, a.weight_hh, P, hidden_panels, R::left_at(left, odd(rows.all), 0, rows.at),
                        rows.all, rows.count(), step, Place{recurrent, W, Bp * W}, kColumns * Bp * W);
    bool masked = a.options.h_mask || a.options.resets;
    if (!masked && !(a.dh0 && rows.end > n_before)) return;
    for (int64_t block = own_outputs(team).begin; block < own_outputs(team).end; ++block) {
      int columns = sizes.outputs(block);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        float* p = recurrent + r_at(block, row);
        int64_t to = steps.batch_row(row) * P + block * W;
        if (is_reset(step, row)) store(p, V{});
        if (a.options.h_mask) store(p, load(p) * load_part(a.options.h_mask + to, columns));
        if (a.dh0 && row >= n_before)
          store_part(a.dh0 + to, has_direct ? load(p) + load(direct + state_at(block, row)) : load(p), columns);
      }
    }
  }

  /* The same with the weights as they lie: rows of them times dgates, added up in place. */
  void multiply_step_direct(const Team& team, const Rows& rows) {
    int64_t column = own_outputs(team).begin * W, columns = smaller(own_outputs(team).end * W, P) - column;
    multiply_rows_direct(rows, recurrent, r_row, column, columns, dg, Factors{a.weight_hh, H, P, G});
  }

  /* A matrix as it lies, `height` rows for each of `gates`, by which gradients of as many units are multiplied. */
  struct Factors {
    const float* weight;
    int64_t height, width;
    int gates;
  };

  /* Columns of a product of rows of gradients, [(block, gate)][row of the chunk][W]. */
  void multiply_rows_direct(const Rows& rows, float* to, int64_t to_row, int64_t column, int64_t columns, const float* from,
                            const Factors& factors) {
    if (columns <= 0) return;
    for (int64_t row = 0; row < rows.count(); ++row) clear(to + row * to_row + column, ceil_div(columns, W) * W);
    for (int64_t row = 0; row < rows.count(); row += 2) {
      float* out[2] = {to + row * to_row + column, to + (row + 1) * to_row + column};
      add_rows(int(smaller(rows.count() - row, 2)), from + (rows.at + row) * W, rows.all, factors, column, columns, out);
    }
  }

  /* out[r] += the r-th row of gradients times the columns. */
  static void add_rows(int count, const float* from, int64_t rows, const Factors& factors, int64_t column, int64_t columns,
                       float* const* out) {
    for (int64_t block = 0; block * W < factors.height; ++block) {
      int units = int(smaller(factors.height - block * W, W));
      for (int gate = 0; gate < factors.gates; ++gate)
        for (int u = 0; u < units; u += kDepthAtOnce) {
          int depth = units - u < kDepthAtOnce ? units - u : kDepthAtOnce;
          const float* part = from + (block * factors.gates + gate) * odd(rows) * W + u;
          const float* weights = factors.weight + (gate * factors.height + block * W + u) * factors.width + column;
          if (count == 2)
            add_scaled<2>(depth, part, W, weights, factors.width, columns, out);
          else
            add_scaled<1>(depth, part, W, weights, factors.width, columns, out);
        }
    }
  }

  void input_gradients_direct(const Team& team, int64_t first_step, int64_t last_step, const Rows& rows) {
    int64_t column = team.begin(sizes.input_blocks) * W;
    int64_t columns = smaller(team.end(sizes.input_blocks) * W, I) - column;
    if (columns <= 0) return;
    float* out[2] = {nullptr, nullptr};
    int64_t at = 0, waiting = 0;
    for (int64_t step = first_step; step < last_step; ++step)
      for (int64_t row = 0, n = steps.rows(step); row < n; ++row, ++at) {
        float* to = a.dx + steps.offset(steps.time(step), row, a.dx_step, a.dx_row) + column;
        if (!a.accumulate_dx) clear(to, columns);
        out[waiting++] = to;
        if (waiting == 2 || at + 1 == rows.all) {
          const float* from = dg_input + (at + 1 - waiting) * W;
          add_rows(int(waiting), from, rows.all, Factors{a.weight_ih, H, I, G}, column, columns, out);
          waiting = 0;
        }
      }
  }

  void input_gradients(const Team& team, int64_t first_step, int64_t last_step, const Rows& rows) {
    int64_t first = team.begin(input_panels), last = team.end(input_panels);
    multiply_gates<F>(team, packed_inputs, a.weight_ih, I, input_panels, left_input, rows.all, rows.all, 0,
                      Place{dx, kPanel, W}, rows.all * kPanel);
    int64_t at = 0;
    for (int64_t step = first_step; step < last_step; ++step) {
      int64_t t = steps.time(step);
      for (int64_t row = rows.begin, end = smaller(rows.end, steps.rows(step)); row < end; ++row, ++at) {
        float* to = a.dx + steps.offset(t, row, a.dx_step, a.dx_row);
        for (int64_t panel = first; panel < last; ++panel)
          for (int64_t i = 0, column = panel * kPanel; i < kColumns && column < I; ++i, column += W) {
            int columns = int(smaller(I - column, W));
            V v = load(dx + (panel * rows.all + at) * kPanel + i * W);
            store_part(to + column, a.accumulate_dx ? v + load_part(to + column, columns) : v, columns);
          }
      }
    }
  }

};

}  // namespace LS_TARGET
}  // namespace ls

#endif
