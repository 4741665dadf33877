/* A whole language model, symbol after symbol, in one call: it reads texts, or writes them.

     symbol -> its row of the table -> layers -> logits -> -log p of the symbol that followed, or a symbol is chosen -> ...

   Texts have nothing to do with each other, so teams of threads divide them and never wait. Few texts wait for the weights to come
   from the caches, so there teams have several threads, which divide the panels, and wait for each other after every layer. */

#ifndef LONGSHORT_DECODE_H
#define LONGSHORT_DECODE_H

#include "bytes.h"
#include "equations.h"
#include "layout.h"
#include "normal.h"
#include "output.h"

namespace ls {
namespace LS_TARGET {

/* Floats of a panel of the output layer with weights of eight bits: biases, then `round_panel`'s. */
static inline int64_t head_bytes(const Head& head) {
  return kHeadVectors * W + bytes_floats(head.blocks() * W, kHeadVectors * W);
}

/* A layer's panel with weights of eight bits: biases, then `round_panel`'s of W_ih, then those of W_hh. */
template <class Cell>
struct BytePanel {
  static constexpr int NW = Sizes<Cell>::N * W;
  const Sizes<Cell>& sizes;
  int64_t inputs_at() const { return sizes.bias_floats(); }
  int64_t hidden_at() const { return inputs_at() + bytes_floats(sizes.input_blocks * W, NW); }
  int64_t floats() const { return hidden_at() + bytes_floats(sizes.hidden_blocks() * W, NW); }

  void round(const float* packed, float* out) const {
    __builtin_memcpy(out, packed, size_t(sizes.bias_floats()) * sizeof(float));
    const float* inputs = packed + sizes.bias_floats();
    round_panel(inputs, sizes.input_blocks * W, NW, out + inputs_at());
    round_panel(inputs + sizes.input_floats(), sizes.hidden_blocks() * W, NW, out + hidden_at());
  }
};

/* What reading and writing share. Pass, Read, ReadTree or Decode, says what happens before and after each step. */
template <class Pass, class Cell, class Args>
struct Language {
  static constexpr int N = panel_vectors<Cell>();
  static constexpr int NW = N * W;
  static constexpr int G = Cell::kGates;
  static constexpr bool kLstm = Cell::kCell == LS_LSTM, kGru = Cell::kCell == LS_GRU;

  const Args& a;
  const int64_t B; /* texts, or the most that a tree has side by side */
  const ls_model& model;
  const Sizes<Cell> first, upper; /* of the first layer, which has no product for its input where there is a table */
  const Head head;
  const int64_t steps;
  const bool fours; /* whether products of eight bits have their own instruction */
  int status;
  Teams teams;

  /* What a team needs for its rows: of a tree as many as a step has. */
  struct Rows {
    int64_t begin, count, room;
    float* h[2]; /* [layer][U][room][W]: before and after a step */
    float* c;
    float* x;      /* of the embedding, blocked */
    float* xg;     /* with layer normalisation the input's share of the gates, [panel][room][N W] */
    float* hg;     /* the state's */
    float* sum[2]; /* [U][room][W]: what residual layers put out, one and the one above it */
    float* left;   /* of each of its threads two left factors, where products do not read floats */
    float* logits; /* [row][head.width()] */
    void* choice;  /* scratch of `choose_by_weight` */
    int64_t* levels; /* of a tree: the first node of each */
    double* sums;    /* and of each row what `log_sum` gives */
    float* moved;    /* and of each thread a block of a state */
    int64_t* ids;
    float* memory;
  };
  Team::Shared* shared;
  Rows* of_teams;

  Language(const Args& args, int64_t steps, int64_t B, int64_t all_rows)
      : a(args), B(B), model(args.model), first(args.model.table ? 0 : args.model.E, args.model.H),
        upper(args.model.H, args.model.H), head{args.model.V, args.model.H}, steps(steps),
        fours(args.model.int8 == 1 && multiplies_bytes()), status(LS_OK) {
    const int most = int(smaller(a.num_threads, kMostThreads)), largest = int(smaller(most, upper.panels));
    teams = {int(larger(smaller(most / largest, B / enough()), 1)), largest};
    /* Smaller ones, if they have enough rows, and leave few threads idle. */
    for (int size = int(smaller(most / 2, largest)); size > 0; --size) {
      const int count = most / size;
      if (B >= int64_t(count) * enough() && 8 * count * size >= 7 * most) teams = {count, size};
    }
    if (Pass::kTree) teams = {1, largest}; /* rows go on from rows of other teams */
    double inputs = double(model.table ? 0 : model.E) + double(model.layers - 1) * double(model.H);
    double weights = G * double(model.H) * (inputs + double(model.layers * model.H)) + double(model.V * model.H);
    /* A weight of few rows takes the time of five operations to come, of eight bits of four. */
    const int64_t waited = teams.size > 1 ? teams.count * steps * (model.int8 ? 4 : 5) : 0;
    teams = useful_teams(teams, weights * double(larger(2 * all_rows, waited)), double(steps * (model.layers + 2)), 1.0);
  }

  int32_t run() {
    float* memory = static_cast<float*>(take(size_t(carve_teams(nullptr)) * sizeof(float)));
    if (!memory) return LS_OUT_OF_MEMORY;
    clear(memory, carve_teams(memory));
    parallel(
        teams.count * teams.size, a.num_threads,
        [](void* context, int thread, int count) { static_cast<Language*>(context)->work(thread, count); }, this);
    give(memory);
    return status;
  }

  int64_t carve_teams(float* memory) {
    Arena arena(memory);
    shared = reinterpret_cast<Team::Shared*>(arena.array(int64_t(sizeof(Team::Shared) / 4) * teams.count));
    of_teams = reinterpret_cast<Rows*>(arena.array(int64_t(sizeof(Rows) / 4) * teams.count));
    return arena.floats();
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    MatrixUnit unit;
    Team(nullptr, thread, count).for_teams(shared, teams.count, [&](Team& team, int64_t number) {
      Rows& rows = of_teams[number];
      if (team.leads()) {
        rows.begin = B * number / teams.count;
        rows.count = B * (number + 1) / teams.count - rows.begin;
        begin(rows);
      }
      if (!team.wait() || !rows.memory) return;
      run_steps(rows, team);
      if (team.leads()) end(rows);
    });
  }

  Pass& pass() { return static_cast<Pass&>(*this); }

  /* Of a pass whose rows go on from themselves. */
  bool moves(const Rows&, int64_t) const { return false; }
  const int64_t* parents_of(const Rows&, int64_t) const { return nullptr; }

  /* All steps of a team's rows. */
  void run_steps(Rows& rows, Team& team) {
    for (int64_t t = 0; t < steps; ++t) {
      const int now = t & 1;
      if (team.leads()) {
        pass().before(rows, t);
        if (!model.table) copy_embedding(rows);
      }
      if (!team.wait()) return;
      if (pass().moves(rows, t)) {
        move_rows(rows, pass().parents_of(rows, t), now, team);
        if (!team.wait()) return;
      }
      const float* below = rows.x;
      for (int64_t layer = 0; layer < model.layers; ++layer) {
        float* sum = model.residual && layer ? rows.sum[layer & 1] : nullptr;
        if (model.gains) {
          run_products(rows, layer, now, below, team);
          if (!team.wait()) return;
          normalise_rows(rows, layer, now, below, sum, team);
        } else {
          run_layer(rows, layer, now, below, sum, team);
        }
        if (!team.wait()) return;
        below = sum ? sum : rows.h[1 - now] + layer * layer_floats(rows);
      }
      if (!pass().wants_logits(t)) continue;
      run_head(rows, below, team);
      if (!team.wait()) return;
      pass().after(rows, t, team);
    }
  }

  /* Rows for which a product lasts as long as its weights take to come. */
  int enough() const { return model.int8 ? 2 : kAccumulators / N; }

  int64_t layer_floats(const Rows& rows) const { return upper.U * rows.room * W; }

  int64_t carve(Rows& rows, float* memory) const {
    Arena arena(memory);
    rows.room = odd(rows.count);
    for (float*& state : rows.h) state = arena.array(model.layers * layer_floats(rows));
    rows.c = kLstm ? arena.array(model.layers * layer_floats(rows)) : nullptr;
    rows.x = arena.array(first.input_blocks * rows.room * W);
    const int64_t gate_floats = model.gains ? upper.panels * rows.room * NW : 0;
    rows.xg = arena.array(gate_floats);
    rows.hg = arena.array(gate_floats);
    for (float*& sum : rows.sum) sum = model.residual ? arena.array(layer_floats(rows)) : nullptr;
    rows.left = has_factors() ? arena.array(teams.size * 2 * factor_floats(rows)) : nullptr;
    rows.logits = arena.array(rows.count * head.width());
    rows.choice = arena.array(int64_t(choice_bytes(model.V) / sizeof(float)));
    rows.levels = reinterpret_cast<int64_t*>(arena.array(Pass::kTree ? 2 * (steps + 2) : 0));
    rows.sums = reinterpret_cast<double*>(arena.array(Pass::kTree ? 2 * rows.count : 0));
    rows.moved = arena.array(Pass::kTree ? teams.size * rows.room * W : 0);
    rows.ids = reinterpret_cast<int64_t*>(arena.array(2 * rows.count));
    return arena.floats();
  }

  /* Gives rows their memory, if there is any. */
  void begin(Rows& rows) {
    int64_t floats = carve(rows, nullptr);
    rows.memory = static_cast<float*>(take(size_t(floats) * sizeof(float)));
    if (!rows.memory) {
      __atomic_store_n(&status, int(LS_OUT_OF_MEMORY), __ATOMIC_RELAXED);
      return;
    }
    must_be(carve(rows, rows.memory) == floats);
    pass().start(rows);
  }

  void end(const Rows& rows) {
    pass().finish(rows);
    give(rows.memory);
  }

  /* The state before the first step: as the caller has it, or zero. */
  void take_state(const Rows& rows, const float* h, const float* c) const {
    for (int64_t layer = 0; layer < model.layers; ++layer)
      for (int64_t block = 0; block < upper.U; ++block)
        for (int64_t row = 0; row < rows.count; ++row) {
          const int units = h ? upper.units(block) : 0;
          int64_t from = caller_place(rows, layer, block, row), to = place(rows, layer, block, row);
          store(rows.h[0] + to, units ? load_part(h + from, units) : V{});
          store(rows.h[1] + to, V{});
          if (kLstm) store(rows.c + to, units ? load_part(c + from, units) : V{});
        }
  }

  /* And that after the last. */
  void give_state(const Rows& rows, float* h, float* c) const {
    for (int64_t layer = 0; layer < model.layers; ++layer)
      for (int64_t block = 0; block < upper.U; ++block)
        for (int64_t row = 0; row < rows.count; ++row) {
          int units = upper.units(block);
          int64_t from = place(rows, layer, block, row), to = caller_place(rows, layer, block, row);
          if (!units) continue;
          store_part(h + to, load(rows.h[steps & 1] + from), units);
          if (kLstm) store_part(c + to, load(rows.c + from), units);
        }
  }

  /* Row r goes on from the state of row parents[r]. */
  void move_rows(const Rows& rows, const int64_t* parents, int now, const Team& team) const {
    float* moved = rows.moved + team.index() * rows.room * W;
    for (int64_t layer = 0; layer < model.layers; ++layer)
      for (int64_t block = team.begin(upper.U); block < team.end(upper.U); ++block)
        for (int which = 0; which < (kLstm ? 2 : 1); ++which) {
          float* state = (which ? rows.c : rows.h[now]) + place(rows, layer, block, 0);
          for (int64_t row = 0; row < rows.count; ++row) store(moved + row * W, load(state + parents[row] * W));
          __builtin_memcpy(state, moved, size_t(rows.count * W) * sizeof(float));
        }
  }

  float* logits_of(const Rows& rows, int64_t row) const { return rows.logits + row * head.width(); }

  /* The caller's logits of the rows, (B, V). */
  template <bool kOut>
  void copy_logits(const Rows& rows, float* logits) const {
    for (int64_t row = 0; row < rows.count; ++row) {
      float *ours = logits_of(rows, row), *theirs = logits + (rows.begin + row) * model.V;
      __builtin_memcpy(kOut ? theirs : ours, kOut ? ours : theirs, size_t(model.V) * sizeof(float));
    }
  }

  /* Where unit block `block` of a row lies in the state of a layer, and in h and c as the caller has them. */
  int64_t place(const Rows& rows, int64_t layer, int64_t block, int64_t row) const {
    return layer * layer_floats(rows) + (block * rows.room + row) * W;
  }
  int64_t caller_place(const Rows& rows, int64_t layer, int64_t block, int64_t row) const {
    return (layer * B + rows.begin + row) * model.H + block * W;
  }

  /* A row's state becomes zero. */
  void forget(const Rows& rows, int64_t row, int now) {
    for (int64_t layer = 0; layer < model.layers; ++layer)
      for (int64_t block = 0; block < upper.U; ++block) {
        store(rows.h[now] + place(rows, layer, block, row), V{});
        if (kLstm) store(rows.c + place(rows, layer, block, row), V{});
      }
  }

  bool has_factors() const { return !Step::kFloats || model.int8; }
  int64_t factor_floats(const Rows& rows) const {
    const int64_t blocks = larger(first.input_blocks, upper.hidden_blocks());
    return model.int8 ? byte_rows_floats(blocks * W, rows.room) : Step::left_floats(blocks, rows.room);
  }

  /* Calls `f` with the way in which bytes are multiplied. */
  template <class F>
  void with_bytes(F f) const {
#if defined(__AVX512F__)
    if (fours) return f(Fours());
#endif
    f(Twos());
  }

  /* What a layer reads, `from` [block][room][W], as its products read it: this thread's `which`-th left factor. */
  float* factors(const Rows& rows, const float* from, int64_t blocks, int which, const Team& team) const {
    if (!has_factors()) return const_cast<float*>(from);
    float* left = rows.left + (2 * team.index() + which) * factor_floats(rows);
    if (model.int8) {
      with_bytes([&](auto products) { round_rows<decltype(products)>(from, blocks, rows.room, rows.count, left); });
      return left;
    }
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t row = 0; row < rows.count; ++row)
        Step::store_left(Step::left_at(left, rows.room, block, row), load(from + (block * rows.room + row) * W));
    Step::fill_left(left, blocks, rows.room, 0, rows.count);
    return left;
  }

  /* out = start + a weights of `count` rows of K from `row`. */
  template <int Vectors>
  void product(const Rows& rows, int64_t row, int count, int64_t K, float* a_factors, const float* weights,
               const Place& start, const Place& out) const {
    if (model.int8)
      with_bytes([&](auto products) {
        multiply_bytes_rows<decltype(products), Vectors>(count, ceil_div(K, W), a_factors, rows.room, row, weights, start, out);
      });
    else
      multiply_rows<Step, Vectors>(count, Step::depth_of(K), Step::left_at(a_factors, rows.room, 0, row), rows.room, weights,
                                   start, out, {});
  }

  void copy_embedding(const Rows& rows) {
    for (int64_t row = 0; row < rows.count; ++row)
      for (int64_t block = 0; block < first.input_blocks; ++block)
        store(rows.x + (block * rows.room + row) * W, row_block(model.embedding + rows.ids[row] * model.E, model.E, block));
  }

  bool from_table(int64_t layer) const { return layer == 0 && model.table; }
  const Sizes<Cell>& sizes_of(int64_t layer) const { return layer ? upper : first; }

  /* A layer's panel: its biases, which its other weights follow. */
  const float* biases_of(int64_t layer, int64_t panel) const {
    const Sizes<Cell>& sizes = sizes_of(layer);
    return model.packed[layer] + panel * (model.int8 ? BytePanel<Cell>{sizes}.floats() : sizes.panel_floats());
  }
  const float* hidden_of(int64_t layer, int64_t panel) const {
    const Sizes<Cell>& sizes = sizes_of(layer);
    const float* biases = biases_of(layer, panel);
    return biases + (model.int8 ? BytePanel<Cell>{sizes}.hidden_at() : sizes.bias_floats() + sizes.input_floats());
  }

  /* What the table gives a panel's gates of some rows, [row][N W]. */
  void copy_table(const Rows& rows, int64_t panel, int64_t row, int count, float* out) const {
    for (int r = 0; r < count; ++r)
      __builtin_memcpy(out + r * NW, model.table + (rows.ids[row + r] * first.panels + panel) * NW, NW * sizeof(float));
  }

  /* With layer normalisation a row's gates need the whole row. First both shares of all of them, without biases: */
  void run_products(const Rows& rows, int64_t layer, int now, const float* below, const Team& team) {
    const Sizes<Cell>& sizes = sizes_of(layer);
    float* before = factors(rows, rows.h[now] + layer * layer_floats(rows), sizes.hidden_blocks(), 1, team);
    float* inputs_below = from_table(layer) ? nullptr : factors(rows, below, sizes.input_blocks, 0, team);
    Tiles<Step> tiles(rows.count, max_rows<Step, N>());
    alignas(64) static const float zeros[NW] = {};
    const Place start = {const_cast<float*>(zeros), 0, W};
    for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels); ++panel) {
      const float* inputs = biases_of(layer, panel) + sizes.bias_floats();
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t row = tiles.begin(tile), at = (panel * rows.room + row) * NW;
        const int count = tiles.size(tile);
        if (from_table(layer))
          copy_table(rows, panel, row, count, rows.xg + at);
        else
          product<N>(rows, row, count, sizes.I, inputs_below, inputs, start, Place{rows.xg + at, NW, W});
        product<N>(rows, row, count, sizes.P, before, hidden_of(layer, panel), start, Place{rows.hg + at, NW, W});
      }
    }
  }

  /* Then whole rows. */
  void normalise_rows(const Rows& rows, int64_t layer, int now, const float* below, float* sum, const Team& team) {
    const int64_t apart = rows.room * NW, state = layer * layer_floats(rows);
    const float* const* gains = model.gains + 4 * layer;
    for (int64_t row = team.begin(rows.count); row < team.end(rows.count); ++row) {
      float *x_gates = rows.xg + row * NW, *h_gates = rows.hg + row * NW, *c = rows.c + state + row * W;
      Moments of_x{}, of_h = moments<Cell, N>(upper, h_gates, apart);
      if (!from_table(layer)) of_x = moments<Cell, N>(upper, x_gates, apart);
      for (int64_t panel = 0; panel < upper.panels; ++panel)
        for (int unit = 0; unit < Cell::kUnits; ++unit) {
          const int64_t block = panel * Cell::kUnits + unit;
          const int units = upper.units(block);
          if (!units) continue;
          const float* biases = biases_of(layer, panel);
          V gates[G], hidden{};
          for (int gate = 0; gate < G; ++gate) {
            const int64_t n = gate * Cell::kUnits + unit, at = gate * model.H + block * W;
            V from_x = load(x_gates + panel * apart + n * W);
            if (!from_table(layer)) from_x = of_x.normalise(from_x) * load_part(gains[0] + at, units) + load(biases + n * W);
            V from_h = of_h.normalise(load(h_gates + panel * apart + n * W)) * load_part(gains[1] + at, units);
            if (kGru && gate == 2) {
              gates[gate] = from_x;
              hidden = from_h + load(biases + 3 * W);
            } else {
              gates[gate] = from_x + from_h;
            }
          }
          if constexpr (kLstm) { /* the output waits for the whole row's c */
            V after = lstm_c<Cell>(gates, load(c + block * rows.room * W));
            store(c + block * rows.room * W, first_lanes(after, units));
            store(h_gates + panel * apart + unit * W, sigmoid(gates[LstmGates<Cell>::kO]));
          } else if constexpr (kGru) {
            V after = gru_h(gates, hidden, load(rows.h[now] + place(rows, layer, block, row)));
            put(rows, layer, block, row, now, after, below, sum);
          } else {
            put(rows, layer, block, row, now, rnn_h<Cell>(gates[0]), below, sum);
          }
        }
      if constexpr (kLstm) {
        static_assert(Cell::kUnits == 1, "moments of c go from panel to panel");
        const Moments of_c = moments<Cell, 1>(upper, c, rows.room * W);
        for (int64_t block = 0; block < upper.panels; ++block) {
          const int units = upper.units(block);
          V c_hat = of_c.normalise(load(c + block * rows.room * W));
          V read = c_hat * load_part(gains[2] + block * W, units) + load_part(gains[3] + block * W, units);
          put(rows, layer, block, row, now, load(h_gates + block * apart) * tanh(read), below, sum);
        }
      }
    }
  }

  /* A row's new h. Lanes without a unit are 0, whatever the weights: the next product multiplies them by 0. */
  void put(const Rows& rows, int64_t layer, int64_t block, int64_t row, int now, V after, const float* below, float* sum) {
    after = first_lanes(after, upper.units(block));
    const int64_t at = (block * rows.room + row) * W;
    store(rows.h[1 - now] + layer * layer_floats(rows) + at, after);
    if (sum) store(sum + at, after + load(below + at));
  }

  /* `sum`: where the new h is stored once more, with what is `below` added; NULL: nowhere. */
  void run_layer(const Rows& rows, int64_t layer, int now, const float* below, float* sum, const Team& team) {
    const Sizes<Cell>& sizes = layer ? upper : first;
    const int64_t state = layer * layer_floats(rows);
    float* before = factors(rows, rows.h[now] + state, sizes.hidden_blocks(), 1, team);
    float* inputs_below = from_table(layer) ? nullptr : factors(rows, below, sizes.input_blocks, 0, team);
    Tiles<Step> tiles(rows.count, max_rows<Step, N>());
    alignas(64) float xg[tile_floats<Step, N>()], sums[tile_floats<Step, N>()];
    for (int64_t panel = team.begin(sizes.panels); panel < team.end(sizes.panels); ++panel) {
      const float *biases = biases_of(layer, panel), *inputs = biases + sizes.bias_floats(), *hidden = hidden_of(layer, panel);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t row = tiles.begin(tile);
        const int count = tiles.size(tile);
        if (from_table(layer)) {
          copy_table(rows, panel, row, count, xg);
        } else {
          Place start = {const_cast<float*>(biases), 0, W};
          product<N>(rows, row, count, sizes.I, inputs_below, inputs, start, Place{xg, NW, W});
        }
        Place start = {xg, NW, W};
        if constexpr (kGru) { /* n starts from its own hidden bias: r multiplies the sum before the input's share is added */
          __builtin_memcpy(sums, xg, sizeof sums);
          for (int r = 0; r < count; ++r) store(sums + r * NW + 2 * W, load(biases + 3 * W));
          start.p = sums;
        }
        product<N>(rows, row, count, sizes.P, before, hidden, start, Place{sums, NW, W});
        finish_tile(rows, layer, panel, row, count, now, sums, xg, below, sum);
      }
    }
  }

  void finish_tile(const Rows& rows, int64_t layer, int64_t panel, int64_t row, int count, int now, const float* sums,
                   const float* xg, const float* below, float* sum) {
    const int64_t state = layer * layer_floats(rows);
    for (int unit = 0; unit < Cell::kUnits; ++unit) {
      const int64_t block = panel * Cell::kUnits + unit;
      const int units = upper.units(block);
      for (int r = 0; r < count; ++r) {
        const int64_t at = state + (block * rows.room + row + r) * W;
        V gates[G], after;
        for (int gate = 0; gate < G; ++gate) gates[gate] = load(sums + r * NW + (gate * Cell::kUnits + unit) * W);
        if constexpr (kLstm) {
          V c = first_lanes(lstm_c<Cell>(gates, load(rows.c + at)), units);
          store(rows.c + at, c);
          after = sigmoid(gates[LstmGates<Cell>::kO]) * tanh(c);
        } else if constexpr (kGru) {
          V hidden = gates[2];
          gates[2] = load(xg + r * NW + 2 * W);
          after = gru_h(gates, hidden, load(rows.h[now] + at));
        } else {
          after = rnn_h<Cell>(gates[0]);
        }
        put(rows, layer, block, row + r, now, after, below, sum);
      }
    }
  }

  void run_head(const Rows& rows, const float* h, const Team& team) {
    float* state = factors(rows, h, head.blocks(), 0, team);
    Tiles<Step> tiles(rows.count, max_rows<Step, kHeadVectors>());
    for (int64_t panel = team.begin(head.panels()); panel < team.end(head.panels()); ++panel) {
      const float* packed = model.head + panel * (model.int8 ? head_bytes(head) : head.panel_floats<Step>());
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t row = tiles.begin(tile);
        float* out = rows.logits + row * head.width() + panel * kHeadVectors * W;
        product<kHeadVectors>(rows, row, tiles.size(tile), head.H, state, packed + kHeadVectors * W,
                              Place{const_cast<float*>(packed), 0, W}, Place{out, head.width(), W});
      }
    }
  }
};

template <class Cell>
struct Read : Language<Read<Cell>, Cell, ls_read_args> {
  using Base = Language<Read<Cell>, Cell, ls_read_args>;
  using Rows = typename Base::Rows;
  using Base::a, Base::model;

  static constexpr bool kTree = false;

  explicit Read(const ls_read_args& args) : Base(args, args.T, args.B, args.T * args.B) {}

  void start(const Rows& rows) { Base::take_state(rows, a.h, a.c); }
  void before(Rows& rows, int64_t t) {
    __builtin_memcpy(rows.ids, a.ids + t * a.B + rows.begin, size_t(rows.count) * sizeof(int64_t));
  }
  bool wants_logits(int64_t t) const { return a.nats || t + 1 == a.T; }
  void after(const Rows& rows, int64_t t, const Team& team) {
    if (!a.nats) return;
    const int64_t at = t * a.B + rows.begin;
    for (int64_t row = team.begin(rows.count); row < team.end(rows.count); ++row) {
      const float* logits = Base::logits_of(rows, row);
      int64_t target = a.targets[at + row];
      a.nats[at + row] = target < 0 ? 0.0 : log_sum(logits, model.V) - double(logits[target]);
    }
  }
  void finish(const Rows& rows) {
    Base::give_state(rows, a.h, a.c);
    if (a.logits) Base::template copy_logits<true>(rows, a.logits);
  }
};

/* A tree of prefixes: a step is a level, its rows are the nodes that are read. */
template <class Cell>
struct ReadTree : Language<ReadTree<Cell>, Cell, ls_tree_args> {
  using Base = Language<ReadTree<Cell>, Cell, ls_tree_args>;
  using Rows = typename Base::Rows;
  using Base::a, Base::model;
  static constexpr bool kTree = true;

  explicit ReadTree(const ls_tree_args& args) : Base(args, depth(args), most(args), all(args)) {}

  /* Levels with nodes below them; the most that are read in one; all that are read. */
  static int64_t depth(const ls_tree_args& args) {
    int64_t count = 0;
    while (count < args.levels && args.reads[count]) ++count;
    return count;
  }
  static int64_t most(const ls_tree_args& args) {
    int64_t count = 0;
    for (int64_t t = 0; t < args.levels; ++t) count = larger(count, args.reads[t]);
    return count;
  }
  static int64_t all(const ls_tree_args& args) {
    int64_t count = 0;
    for (int64_t t = 0; t < args.levels; ++t) count += args.reads[t];
    return count;
  }

  void start(const Rows& rows) {
    Base::take_state(rows, nullptr, nullptr);
    rows.levels[0] = 0;
    for (int64_t t = 0; t <= Base::steps; ++t) rows.levels[t + 1] = rows.levels[t] + (t < a.levels ? a.nodes[t] : 0);
  }
  void before(Rows& rows, int64_t t) {
    rows.count = a.reads[t];
    __builtin_memcpy(rows.ids, a.ids + rows.levels[t], size_t(rows.count) * sizeof(int64_t));
  }
  bool moves(const Rows& rows, int64_t t) const {
    const int64_t* parents = parents_of(rows, t);
    for (int64_t row = 0; t && row < a.reads[t]; ++row)
      if (parents[row] != row) return true;
    return false;
  }
  const int64_t* parents_of(const Rows& rows, int64_t t) const { return a.parents + rows.levels[t]; }
  bool wants_logits(int64_t) const { return true; }
  /* Each thread those below its rows. What follows the last wait may not depend on rows.count: the next step sets it. */
  void after(const Rows& rows, int64_t t, const Team& team) {
    const int64_t begin = team.begin(a.reads[t]), end = team.end(a.reads[t]);
    for (int64_t row = begin; row < end; ++row) rows.sums[row] = log_sum(Base::logits_of(rows, row), model.V);
    for (int64_t node = rows.levels[t + 1]; node < rows.levels[t + 2]; ++node) {
      const int64_t row = a.parents[node], id = a.ids[node];
      if (row >= begin && row < end && id < model.V) a.nats[node] = rows.sums[row] - double(Base::logits_of(rows, row)[id]);
    }
  }
  void finish(const Rows&) {}
};

template <class Cell>
struct Decode : Language<Decode<Cell>, Cell, ls_decode_args> {
  using Base = Language<Decode<Cell>, Cell, ls_decode_args>;
  using Rows = typename Base::Rows;
  using Base::a, Base::model;

  static constexpr bool kTree = false;

  explicit Decode(const ls_decode_args& args) : Base(args, args.steps, args.B, args.steps * args.B) {}

  void start(const Rows& rows) {
    Base::take_state(rows, a.h, a.c);
    Base::template copy_logits<false>(rows, a.logits);
  }
  void before(const Rows& rows, int64_t step) {
    for (int64_t row = 0; row < rows.count; ++row) {
      int64_t id = choose(Base::logits_of(rows, row), a.sampling[rows.begin + row], step, static_cast<double*>(rows.choice));
      a.ids[step * a.B + rows.begin + row] = rows.ids[row] = id;
      if (id == a.newline) Base::forget(rows, row, step & 1);
    }
  }
  int64_t choose(const float* logits, const ls_sampling& sampling, int64_t step, double* scratch) const {
    const float largest = largest_of(logits, model.V);
    int64_t best = 0;
    if (largest == largest)
      while (logits[best] != largest) ++best;
    if (sampling.temperature == 0.0) return best;
    exponentials(logits, model.V, double(largest), sampling.temperature, scratch);
    return choose_by_weight(logits, best, model.V, sampling, step, scratch);
  }
  bool wants_logits(int64_t) const { return true; }
  void after(const Rows&, int64_t, const Team&) {}
  void finish(const Rows& rows) {
    Base::give_state(rows, a.h, a.c);
    Base::template copy_logits<true>(rows, a.logits);
  }
};

template <class Cell>
static void round_layer(int64_t I, int64_t H, const float* packed, float* out) {
  Sizes<Cell> sizes(I, H);
  BytePanel<Cell> bytes{sizes};
  for (int64_t panel = 0; panel < sizes.panels; ++panel)
    bytes.round(packed + panel * sizes.panel_floats(), out + panel * bytes.floats());
}

static inline void round_head(const Head& head, const float* packed, float* out) {
  constexpr int64_t columns = kHeadVectors * W;
  for (int64_t panel = 0; panel < head.panels(); ++panel) {
    __builtin_memcpy(out, packed, columns * sizeof(float));
    round_panel(packed + columns, head.blocks() * W, columns, out + columns);
    packed += head.panel_floats<Step>();
    out += head_bytes(head);
  }
}

/* table[symbol][panel][N][W] = rows[symbol][gate][H]. */
template <class Cell>
static void pack_table(int64_t symbols, int64_t H, const float* rows, float* table) {
  Sizes<Cell> sizes(0, H);
  for (int64_t symbol = 0; symbol < symbols; ++symbol, rows += Cell::kGates * H)
    for (int64_t panel = 0; panel < sizes.panels; ++panel, table += Sizes<Cell>::N * W)
      for (int gate = 0; gate < Cell::kGates; ++gate)
        for (int unit = 0; unit < Cell::kUnits; ++unit) {
          int64_t block = panel * Cell::kUnits + unit;
          int units = sizes.units(block);
          store(table + (gate * Cell::kUnits + unit) * W, units ? load_part(rows + gate * H + block * W, units) : V{});
        }
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
