/* The backward pass of one layer in one direction: backpropagation through time.

   For a chunk of steps, from the last to the first:

     step:   dh = dy + dgates(next step) W_hh -> dgates, dc                  (own units)   | all wait |
     chunk:  dx = dgates W_ih (own columns);  dW_ih += dgates^T x,  dW_hh += dgates^T h,  db += sum of dgates  (own units)

   dgates are the gradients before the activations. The GRU has two sets: its candidate's input and hidden share differ by
   the factor r. A team divides units; there is one team, since all rows add to the same weights. */

#ifndef LONGSHORT_BACKWARD_H
#define LONGSHORT_BACKWARD_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

template <class Cell>
struct Backward {
  static constexpr int G = Cell::kGates, S = Cell::kSaved;
  static constexpr bool kLstm = Cell::kCell == LS_LSTM, kGru = Cell::kCell == LS_GRU;
  static constexpr int kColumns = 2; /* vectors in a panel of the products with W_ih and W_hh */
  static constexpr int kOuter = kOuterVectors * W;
  static constexpr int kPanel = kColumns * W;
  static constexpr int64_t kDepth = 1024 / W; /* blocks of k at a time: 128 KB of a panel, beside as many rows of dgates */
  static constexpr int64_t kGroup = (128 << 10); /* floats of dgates that meet all columns of the weights at a time */

  const ls_backward_args& a;
  const Steps steps;
  const Sizes<Cell> sizes;
  int64_t T, B, I, H;
  int64_t Bp;             /* rows that a blocked array of states has room for */
  int threads;
  int64_t chunk_rows;
  int64_t U;              /* unit blocks, without those that are all padding */
  int64_t hidden_panels, input_panels;
  bool options, has_direct;
  bool direct_weights;    /* they are read as they lie; `recurrent` has its rows one after the other then */
  int64_t r_row, r_block;

  int64_t* row_offset;
  float* packed_hidden;   /* [panel][(unit block, gate, unit)][kColumns W] */
  float* packed_inputs;
  float* dg;              /* what reached W_hh h: blocked, [(unit block, gate)][row of the chunk][W] */
  float* dg_input;        /* what reached W_ih x; the same but for the GRU */
  float* recurrent;       /* dgates W_hh, blocked [unit block][row][W] */
  float* direct;          /* what reaches h past W_hh: GRU's z, zoneout */
  float* dc;
  float* dx;              /* [panel][row of the chunk][kPanel] */
  float* x_columns;       /* the chunk's x and its h before each step: [panel of columns][row][kOuterVectors W] */
  float* h_columns;
  Team::Shared* shared;

  Backward(const ls_backward_args& args)
      : a(args), steps(args.shape), sizes(args.shape.I, args.shape.H), T(args.shape.T), B(args.shape.B),
        I(args.shape.I), H(args.shape.H), Bp(odd(B)), U(ceil_div(H, W)) {
    const ls_options& o = a.options;
    options = o.h_mask || o.resets || o.zoneout_mask || o.zoneout != 0.0f;
    has_direct = kGru || o.zoneout_mask || o.zoneout != 0.0f;
    direct_weights = reads_direct(a.shape, steps.total_rows(), true);
    r_row = direct_weights ? U * W + W : W;
    r_block = direct_weights ? W : Bp * W;
    hidden_panels = ceil_div(U, kColumns);
    input_panels = ceil_div(sizes.input_blocks, kColumns);
    double flops = 4.0 * double(steps.total_rows()) * G * double(H) * double(I + H);
    threads = useful_threads(int(smaller(a.shape.num_threads, hidden_panels)), flops, double(T));
    int64_t fitting = (1 << 20) / (U * G * W); /* 4 MB of dgates */
    chunk_rows = larger(larger(B, 1), smaller(steps.total_rows(), smaller(larger(fitting, 64), 512)));
  }

  int64_t carve(float* memory) {
    Arena arena(memory);
    int64_t K = U * G * W;
    packed_hidden = direct_weights ? nullptr : arena.array(hidden_panels * K * kColumns * W);
    packed_inputs = a.dx && !direct_weights ? arena.array(input_panels * K * kColumns * W) : nullptr;
    dg = arena.array(U * G * odd(chunk_rows) * W);
    dg_input = kGru ? arena.array(U * G * odd(chunk_rows) * W) : dg;
    int64_t state = hidden_panels * kColumns * Bp * W;
    recurrent = arena.array(direct_weights ? B * r_row : state);
    direct = has_direct ? arena.array(state) : nullptr;
    dc = kLstm ? arena.array(state) : nullptr;
    dx = a.dx && !direct_weights ? arena.array(input_panels * chunk_rows * kPanel) : nullptr;
    x_columns = a.dweight_ih ? arena.array(ceil_div(I, kOuter) * chunk_rows * kOuter) : nullptr;
    h_columns = a.dweight_hh ? arena.array(ceil_div(H, kOuter) * chunk_rows * kOuter) : nullptr;
    row_offset = reinterpret_cast<int64_t*>(arena.array(2 * T));
    shared = reinterpret_cast<Team::Shared*>(arena.array(int64_t(sizeof(Team::Shared) / 4)));
    return arena.floats();
  }

  int32_t run() {
    if (steps.total_rows() == 0) {
      no_steps();
      return LS_OK;
    }
    int64_t floats = carve(nullptr);
    float* memory = static_cast<float*>(take(size_t(floats) * sizeof(float)));
    if (!memory) return LS_OUT_OF_MEMORY;
    carve(memory);
    steps.count_rows(row_offset);
    clear(reinterpret_cast<float*>(shared), int64_t(sizeof(Team::Shared) / 4));
    parallel(
        threads,
        [](void* context, int thread, int count) { static_cast<Backward*>(context)->work(thread, count); }, this);
    give(memory);
    return LS_OK;
  }

  void no_steps() {
    copy_or_clear(a.dh0, a.dh_n, B * H);
    copy_or_clear(a.dc0, a.dc_n, B * H);
    copy_or_clear(a.dweight_ih, nullptr, G * H * I);
    copy_or_clear(a.dweight_hh, nullptr, G * H * H);
    copy_or_clear(a.dbias_ih, nullptr, G * H);
    copy_or_clear(a.dbias_hh, nullptr, G * H);
    if (a.dx && !a.accumulate_dx) clear_past_ends(steps, 0, T, a.dx, a.dx_step, a.dx_row, I);
  }

  static void copy_or_clear(float* to, const float* from, int64_t floats) {
    if (!to || to == from) return;
    if (from)
      __builtin_memcpy(to, from, size_t(floats) * sizeof(float));
    else
      clear(to, floats);
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    Team team(shared, thread, count);
    for (int64_t panel = team.begin(hidden_panels); panel < team.end(hidden_panels) && packed_hidden; ++panel)
      pack_columns(a.weight_hh, H, panel, packed_hidden);
    if (packed_inputs)
      for (int64_t panel = team.begin(input_panels); panel < team.end(input_panels); ++panel)
        pack_columns(a.weight_ih, I, panel, packed_inputs);
    start_state(team);
    bool add = false;
    for (int64_t last = T, first; last > 0; last = first) {
      int64_t rows = 0;
      for (first = last; first > 0; --first) {
        int64_t more = steps.rows(first - 1);
        if (first < last && rows + more > chunk_rows) break;
        rows += more;
      }
      copy_columns(team, first, last, rows);
      int64_t at = rows;
      for (int64_t step = last - 1; step >= first; --step) {
        int64_t n = steps.rows(step);
        at -= n;
        run_step(team, step, n, rows, at);
        if (!team.wait()) return;
        if (step > 0 || a.dh0) multiply_step(team, step, n, rows, at);
      }
      if (a.dx && direct_weights)
        input_gradients_direct(team, first, last, rows);
      else if (a.dx)
        input_gradients(team, first, last, rows);
      weight_gradients(team, rows, add);
      add = true;
      if (!team.wait()) return;
    }
    if (a.dx && !a.accumulate_dx) clear_past_ends(steps, team.begin(T), team.end(T), a.dx, a.dx_step, a.dx_row, I);
  }

  /* panel[(unit block, gate, u)][kColumns W] = weight[gate H + unit][columns]: the order of k in which dgates lie. */
  void pack_columns(const float* weight, int64_t columns, int64_t panel, float* packed) {
    constexpr int width = kPanel;
    float* out = packed + panel * U * G * W * width;
    int64_t column = panel * width;
    int64_t left = columns - column;
    for (int64_t block = 0; block < U; ++block) {
      int units = sizes.units(block);
      for (int gate = 0; gate < G; ++gate)
        for (int u = 0; u < W; ++u, out += width) {
          const float* from = weight + (gate * H + block * W + u) * columns + column;
          for (int i = 0; i < kColumns; ++i) {
            int64_t valid = u < units ? left - i * W : 0;
            store(out + i * W, valid > 0 ? load_part(from + i * W, int(smaller(valid, W))) : V{});
          }
        }
    }
  }

  int64_t first_block(const Team& team) const { return smaller(team.begin(hidden_panels) * kColumns, U); }
  int64_t last_block(const Team& team) const { return smaller(team.end(hidden_panels) * kColumns, U); }

  /* Gradients of the states after the last steps; of rows without any step they are those of the states before. */
  void start_state(const Team& team) {
    for (int64_t block = first_block(team); block < last_block(team); ++block) {
      int units = sizes.units(block);
      for (int64_t row = 0; row < B; ++row) {
        int64_t at = (block * Bp + row) * W, from = steps.batch_row(row) * H + block * W;
        V dh = a.dh_n ? load_part(a.dh_n + from, units) : V{};
        store(recurrent + r_at(block, row), dh);
        if (has_direct) store(direct + at, V{});
        if (a.dh0) store_part(a.dh0 + from, dh, units);
        if (kLstm) {
          V d = a.dc_n ? load_part(a.dc_n + from, units) : V{};
          store(dc + at, d);
          if (a.dc0) store_part(a.dc0 + from, d, units);
        }
      }
    }
  }

  int64_t r_at(int64_t block, int64_t row) const { return block * r_block + row * r_row; }

  bool is_reset(int64_t step, int64_t row) const {
    return a.options.resets && a.options.resets[steps.time(step) * B + steps.batch_row(row)];
  }

  /* dh -> dgates of one step, own units. `at`: the step's first row in the chunk. */
  void run_step(const Team& team, int64_t step, int64_t n, int64_t rows, int64_t at) {
    if (options)
      run_step_rows<true>(team, step, n, rows, at);
    else
      run_step_rows<false>(team, step, n, rows, at);
  }

  template <bool kOptions>
  void run_step_rows(const Team& team, int64_t step, int64_t n, int64_t rows, int64_t at) {
    int64_t t = steps.time(step);
    int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
    for (int64_t block = first_block(team); block < last_block(team); ++block) {
      int units = sizes.units(block);
      const float* saved = a.saved + saved_offset<Cell>(sizes, row_offset[step], n, block, 0);
      const float* saved_before =
          step > 0 ? a.saved + saved_offset<Cell>(sizes, row_offset[step - 1], n_before, block, 0) : nullptr;
      for (int64_t row = 0; row < n; ++row) {
        int64_t state = (block * Bp + row) * W;
        int64_t batch_row = steps.batch_row(row);
        const float* g = saved + row * S * W;
        bool reset = kOptions && is_reset(step, row);
        V dh = load(recurrent + r_at(block, row));
        if (has_direct) dh += load(direct + state);
        if (a.dy) dh += load_part(a.dy + steps.offset(t, row, a.dy_step, a.dy_row) + block * W, units);
        V dh_before{};
        if constexpr (kOptions) {
          if (a.options.zoneout_mask || a.options.zoneout != 0.0f) {
            V zoneout = splat(a.options.zoneout);
            if (a.options.zoneout_mask)
              zoneout = load_part(a.options.zoneout_mask + (t * B + batch_row) * H + block * W, units);
            dh_before = zoneout * dh;
            dh -= dh_before;
          }
        }
        float* out = dg + (block * G * odd(rows) + at + row) * W;
        const int64_t next = odd(rows) * W; /* from one gate to the next */
        if constexpr (kLstm) {
          V i = load(g), f = load(g + W), candidate = load(g + 2 * W), o = load(g + 3 * W), c = load(g + 4 * W);
          V c_before = row < n_before ? load(saved_before + row * S * W + 4 * W)
                       : a.c0         ? load_part(a.c0 + batch_row * H + block * W, units)
                                      : V{};
          if (reset) c_before = V{};
          V tanh_c = tanh(c);
          V dc_row = load(dc + state) + dh * o * (1.0f - tanh_c * tanh_c);
          store(out, dc_row * candidate * i * (1.0f - i));
          store(out + next, dc_row * c_before * f * (1.0f - f));
          store(out + 2 * next, dc_row * i * (1.0f - candidate * candidate));
          store(out + 3 * next, dh * tanh_c * o * (1.0f - o));
          V dc_before = reset ? V{} : dc_row * f;
          store(dc + state, dc_before);
          if (a.dc0 && row >= n_before) store_part(a.dc0 + batch_row * H + block * W, dc_before, units);
        } else if constexpr (kGru) {
          V r = load(g), z = load(g + W), n_gate = load(g + 2 * W), hidden = load(g + 3 * W);
          V before = reset ? V{} : h_before(step, row, n_before, block, units);
          V dn = dh * (1.0f - z) * (1.0f - n_gate * n_gate);
          V dr = dn * hidden * r * (1.0f - r);
          V dz = dh * (before - n_gate) * z * (1.0f - z);
          dh_before += dh * z;
          store(out, dr);
          store(out + next, dz);
          store(out + 2 * next, dn * r);
          float* out_input = dg_input + (block * G * odd(rows) + at + row) * W;
          store(out_input, dr);
          store(out_input + next, dz);
          store(out_input + 2 * next, dn);
        } else {
          V y = load(g);
          if (Cell::kCell == LS_RNN_TANH)
            dh = dh * (1.0f - y * y);
          else
            dh = y > 0.0f ? dh : V{};
          store(out, dh);
        }
        if (has_direct) store(direct + state, reset ? V{} : dh_before);
      }
    }
  }

  /* h before a step: what the step before it put out, or h0. */
  V h_before(int64_t step, int64_t row, int64_t n_before, int64_t block, int units) const {
    if (row < n_before)
      return load_part(a.y + steps.offset(steps.time(step - 1), row, a.y_step, a.y_row) + block * W, units);
    return a.h0 ? load_part(a.h0 + steps.batch_row(row) * H + block * W, units) : V{};
  }

  /* recurrent = dgates W_hh for the step before, own units. */
  void multiply_step(const Team& team, int64_t step, int64_t n, int64_t rows, int64_t at) {
    int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
    if (direct_weights)
      multiply_step_direct(team, n, rows, at);
    else
      multiply_blocks(team.begin(hidden_panels), team.end(hidden_panels), packed_hidden, dg + at * W, rows, n, step,
                    Place{recurrent, W, Bp * W}, kColumns * Bp * W);
    bool masked = a.options.h_mask || a.options.resets;
    if (!masked && !(a.dh0 && n > n_before)) return;
    for (int64_t block = first_block(team); block < last_block(team); ++block) {
      int units = sizes.units(block);
      for (int64_t row = 0; row < n; ++row) {
        float* p = recurrent + r_at(block, row);
        int64_t to = steps.batch_row(row) * H + block * W;
        if (is_reset(step, row)) store(p, V{});
        if (a.options.h_mask) store(p, load(p) * load_part(a.options.h_mask + to, units));
        if (a.dh0 && row >= n_before)
          store_part(a.dh0 + to, has_direct ? load(p) + load(direct + (block * Bp + row) * W) : load(p), units);
      }
    }
  }

  /* Products of `n` rows of dgates, the first at `from`, with the panels [first, last): panel p's sums go to
     out + p * out_panel. k is cut into blocks, so that rows and panel meet in the core's own cache; `turn` alternates. */
  void multiply_blocks(int64_t first, int64_t last, const float* packed, const float* from, int64_t rows, int64_t n,
                       int64_t turn, Place out, int64_t out_panel) {
    Tiles tiles(n, max_rows<kColumns>());
    int64_t all = U * G, depths = ceil_div(all, kDepth);
    for (int64_t d = 0; d < depths; ++d) {
      int64_t depth = turn & 1 ? depths - 1 - d : d;
      int64_t k = depth * kDepth, blocks = smaller(kDepth, all - k);
      Panels panels(packed + (first * all + k) * W * kPanel, blocks * W * kPanel, all * W * kPanel, last - first,
                    turn + d, (last - first) * all * W * kPanel > (1 << 18));
      for (int64_t i = 0; i < panels.count(); ++i)
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          int64_t row = tiles.begin(tile);
          Place sums = {out.p + (first + panels.index(i)) * out_panel + row * out.row, out.row, out.vector};
          multiply_rows<kColumns>(tiles.size(tile), blocks, from + (k * odd(rows) + row) * W, odd(rows) * W, panels.at(i),
                                  Place{d ? sums.p : nullptr, sums.row, sums.vector}, sums,
                                  panels.ahead(i, tile, tiles.count, blocks));
        }
    }
  }

  /* The same with the weights as they lie: rows of them times dgates, added up in place. */
  void multiply_step_direct(const Team& team, int64_t n, int64_t rows, int64_t at) {
    int64_t column = first_block(team) * W, columns = smaller(last_block(team) * W, H) - column;
    if (columns <= 0) return;
    for (int64_t row = 0; row < n; ++row) clear(recurrent + row * r_row + column, ceil_div(columns, W) * W);
    for (int64_t row = 0; row < n; row += 2) {
      float* out[2] = {recurrent + row * r_row + column, recurrent + (row + 1) * r_row + column};
      add_rows(int(smaller(n - row, 2)), dg + (at + row) * W, rows, a.weight_hh + column, H, columns, out);
    }
  }

  /* out[r] += the r-th row of dgates times the weights' columns. */
  void add_rows(int count, const float* from, int64_t rows, const float* weight, int64_t stride, int64_t columns,
                float* const* out) {
    for (int64_t block = 0; block < U; ++block) {
      int units = sizes.units(block);
      for (int gate = 0; gate < G; ++gate)
        for (int u = 0; u < units; u += kDepthAtOnce) {
          int depth = units - u < kDepthAtOnce ? units - u : kDepthAtOnce;
          const float* part = from + (block * G + gate) * odd(rows) * W + u;
          const float* weights = weight + (gate * H + block * W + u) * stride;
          if (count == 2)
            add_scaled<2>(depth, part, W, weights, stride, columns, out);
          else
            add_scaled<1>(depth, part, W, weights, stride, columns, out);
        }
    }
  }

  void input_gradients_direct(const Team& team, int64_t first_step, int64_t last_step, int64_t rows) {
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
        if (waiting == 2 || at + 1 == rows) {
          add_rows(int(waiting), dg_input + (at + 1 - waiting) * W, rows, a.weight_ih + column, I, columns, out);
          waiting = 0;
        }
      }
  }

  void input_gradients(const Team& team, int64_t first_step, int64_t last_step, int64_t rows) {
    int64_t first = team.begin(input_panels), last = team.end(input_panels);
    multiply_blocks(first, last, packed_inputs, dg_input, rows, rows, 0, Place{dx, kPanel, W}, rows * kPanel);
    int64_t at = 0;
    for (int64_t step = first_step; step < last_step; ++step) {
      int64_t t = steps.time(step);
      for (int64_t row = 0, n = steps.rows(step); row < n; ++row, ++at) {
        float* to = a.dx + steps.offset(t, row, a.dx_step, a.dx_row);
        for (int64_t panel = first; panel < last; ++panel)
          for (int64_t i = 0, column = panel * kPanel; i < kColumns && column < I; ++i, column += W) {
            int columns = int(smaller(I - column, W));
            V v = load(dx + (panel * rows + at) * kPanel + i * W);
            store_part(to + column, a.accumulate_dx ? v + load_part(to + column, columns) : v, columns);
          }
      }
    }
  }

  /* What the weights' gradients multiply dgates with: x, and h before each step. */
  void copy_columns(const Team& team, int64_t first, int64_t last, int64_t rows) {
    int64_t at = 0;
    for (int64_t step = first; step < last; ++step) {
      int64_t n_before = step > 0 ? steps.rows(step - 1) : 0;
      for (int64_t row = 0, n = steps.rows(step); row < n; ++row, ++at) {
        if (x_columns)
          copy_row(team, a.x + steps.offset(steps.time(step), row, a.x_step, a.x_row), nullptr, I, at, rows, x_columns);
        if (!h_columns) continue;
        const float* h = nullptr;
        if (!is_reset(step, row)) {
          if (row < n_before)
            h = a.y + steps.offset(steps.time(step - 1), row, a.y_step, a.y_row);
          else if (a.h0)
            h = a.h0 + steps.batch_row(row) * H;
        }
        const float* mask = a.options.h_mask ? a.options.h_mask + steps.batch_row(row) * H : nullptr;
        copy_row(team, h, mask, H, at, rows, h_columns);
      }
    }
  }

  /* Own panels of one row; a panel is as wide as it has vectors. */
  static void copy_row(const Team& team, const float* from, const float* mask, int64_t columns, int64_t at, int64_t rows,
                       float* out) {
    int64_t panels = ceil_div(columns, kOuter);
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      int64_t column = panel * kOuter;
      int vectors = vectors_at(column, columns);
      float* to = out + panel * rows * kOuter + at * vectors * W;
      for (int i = 0; i < vectors; ++i, column += W) {
        int valid = int(smaller(columns - column, W));
        V v = from ? load_part(from + column, valid) : V{};
        store(to + i * W, mask ? v * load_part(mask + column, valid) : v);
      }
    }
  }

  static int vectors_at(int64_t column, int64_t columns) {
    return int(smaller(ceil_div(columns - column, W), kOuterVectors));
  }

  /* Own units' rows of dW_ih, dW_hh and of the biases. */
  void weight_gradients(const Team& team, int64_t rows, bool add) {
    int64_t group = larger(kGroup / (G * W * rows), 1);
    for (int64_t block = first_block(team); block < last_block(team); block += group) {
      int64_t end = smaller(block + group, last_block(team));
      if (a.dweight_ih) outer_columns(block, end, dg_input, rows, x_columns, I, a.dweight_ih, add);
      if (a.dweight_hh) outer_columns(block, end, dg, rows, h_columns, H, a.dweight_hh, add);
    }
    if (a.dbias_ih) sum_rows(team, dg_input, rows, a.dbias_ih, add);
    if (a.dbias_hh) sum_rows(team, dg, rows, a.dbias_hh, add);
  }

  void outer_columns(int64_t first, int64_t last, const float* gradients, int64_t rows, const float* operands,
                     int64_t columns, float* weight, bool add) {
    for (int64_t column = 0; column < columns; column += kOuter) {
      const float* panel = operands + column * rows;
      int vectors = vectors_at(column, columns);
      int valid = int(smaller(columns - column, vectors * W));
      for (int64_t block = first; block < last; ++block) {
        int units = sizes.units(block);
        for (int gate = 0; gate < G; ++gate)
          for (int u = 0; u < units; u += kOuterRows) {
            const float* from = gradients + (block * G + gate) * odd(rows) * W + u;
            float* to = weight + (gate * H + block * W + u) * columns + column;
            int count = units - u < kOuterRows ? units - u : kOuterRows;
            if (vectors == 3)
              multiply_outer<3>(rows, from, panel, to, columns, count, valid, add);
            else if (vectors == 2)
              multiply_outer<2>(rows, from, panel, to, columns, count, valid, add);
            else
              multiply_outer<1>(rows, from, panel, to, columns, count, valid, add);
          }
      }
    }
  }

  void sum_rows(const Team& team, const float* gradients, int64_t rows, float* bias, bool add) {
    for (int64_t block = first_block(team); block < last_block(team); ++block) {
      int units = sizes.units(block);
      for (int gate = 0; gate < G; ++gate) {
        const float* from = gradients + (block * G + gate) * odd(rows) * W;
        V sum[4] = {};
        for (int64_t row = 0; row < rows; ++row) sum[row % 4] += load(from + row * W);
        V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float* to = bias + gate * H + block * W;
        store_part(to, add ? load_part(to, units) + total : total, units);
      }
    }
  }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
