/* All kernels of one target. Compiled once for each, with LS_TARGET its name. */

#include "decode.h"
#include "directions.h"
#include "gates.h"
#include "output.h"

namespace ls {
namespace LS_TARGET {

/* Calls `f` with the cell of a model, or of a layer. */
template <class F>
static auto of_model(int32_t cell, F f) {
  switch (cell) {
    case LS_RNN_TANH: return f(RnnTanh());
    case LS_RNN_RELU: return f(RnnRelu());
    case LS_GRU: return f(Gru());
    default: return f(Lstm());
  }
}

template <class F>
static auto of_layer(int32_t cell, F f) {
  return cell == LS_LSTM_COUPLED ? f(LstmCoupled()) : of_model(cell, f);
}

/* Calls `f` with the factors of products of a chunk, and those step by step, of a layer in training. */
template <class Cell, class F>
static auto with_factors(const ls_shape& s, F f) {
  if (!are_many(Steps(s).total_rows(), Cell::kGates * s.H, s.I + (s.P ? s.P : s.H))) return f(Step(), Step());
  return s.B < kManyRowsOfAStep ? f(OfChunk(), Step()) : f(OfChunk(), OfChunk());
}

static int32_t forward(const ls_forward_args* args, int32_t count) {
  return of_layer(args->shape.cell, [=](auto cell) {
    using Cell = decltype(cell);
    /* Without gradients a row's bits depend on nothing else in the call, so there the factors are always the same. */
    if (!args->saved || args->packed) return run_directions<Forward<Cell, Step, Step>>(args, count);
    return with_factors<Cell>(args->shape, [=](auto chunk, auto step) {
      return run_directions<Forward<Cell, decltype(chunk), decltype(step)>>(args, count);
    });
  });
}

static int32_t backward(const ls_backward_args* args, int32_t count) {
  return of_layer(args->shape.cell, [=](auto cell) {
    using Cell = decltype(cell);
    return with_factors<Cell>(args->shape, [=](auto chunk, auto step) {
      return run_directions<Backward<Cell, decltype(chunk), decltype(step)>>(args, count);
    });
  });
}

static int64_t saved_floats(const ls_shape* shape, bool normal) {
  return of_layer(shape->cell, [=](auto cell) {
    using Cell = decltype(cell);
    return Saved<Cell>(Sizes<Cell>(shape->I, shape->H), normal, Steps(*shape).total_rows()).floats;
  });
}

static void gates(const ls_shape* shape, bool normal, const float* saved, float* out) {
  of_layer(shape->cell, [=](auto cell) { lay_out_gates<decltype(cell)>(*shape, normal, saved, out); });
}

static int64_t packed_floats(int32_t cell, int64_t I, int64_t H, int64_t P) {
  return of_layer(cell, [=](auto cell) {
    Sizes<decltype(cell)> sizes(I, H, P);
    return sizes.panels * sizes.panel_floats() + Projection<Step>{H, P}.floats();
  });
}

static void pack(int32_t cell, int64_t I, int64_t H, int64_t P, const float* weight_ih, const float* weight_hh,
                 const float* bias_ih, const float* bias_hh, const float* weight_hr, float* packed) {
  FlushSubnormals flush;
  const Projection<Step> projection{H, P};
  of_layer(cell, [=](auto cell) {
    Sizes<decltype(cell)> sizes(I, H, P);
    for (int64_t panel = 0; panel < sizes.panels; ++panel)
      pack_panel<Step, Step, decltype(cell)>(sizes, panel, weight_ih, weight_hh, bias_ih, bias_hh,
                                             packed + panel * sizes.panel_floats());
    for (int64_t panel = 0; panel < projection.panels(); ++panel)
      projection.pack(weight_hr, panel, packed + sizes.panels * sizes.panel_floats());
  });
}

static int32_t read(const ls_read_args* args) {
  return of_model(args->model.cell, [=](auto cell) { return Read<decltype(cell)>(*args).run(); });
}

static int32_t read_tree(const ls_tree_args* args) {
  return of_model(args->model.cell, [=](auto cell) { return ReadTree<decltype(cell)>(*args).run(); });
}

static int32_t decode(const ls_decode_args* args) {
  return of_model(args->model.cell, [=](auto cell) { return Decode<decltype(cell)>(*args).run(); });
}

static int32_t loss(const ls_loss_args* args) {
  return are_many(args->N, args->V, args->H) ? Loss<OfChunk>(*args).run() : Loss<Step>(*args).run();
}

static int64_t table_floats(int32_t cell, int64_t symbols, int64_t H) {
  return of_model(cell, [=](auto cell) {
    using Layer = Sizes<decltype(cell)>;
    return symbols * Layer(0, H).panels * Layer::N * W;
  });
}

static void pack_table_of(int32_t cell, int64_t symbols, int64_t H, const float* rows, float* table) {
  of_model(cell, [=](auto cell) { pack_table<decltype(cell)>(symbols, H, rows, table); });
}

static int64_t head_floats(int64_t V, int64_t H) { return Head{V, H}.panels() * Head{V, H}.panel_floats<Step>(); }

static void pack_head(int64_t V, int64_t H, const float* weight, const float* bias, float* head) {
  const Head layer{V, H};
  layer.pack<Step>(weight, bias, head, 0, layer.panels());
}

static int64_t rounded_floats(int32_t cell, int64_t I_or_V, int64_t H) {
  if (cell == -1) return Head{I_or_V, H}.panels() * head_bytes({I_or_V, H});
  return of_model(cell, [=](auto cell) {
    Sizes<decltype(cell)> sizes(I_or_V, H);
    return sizes.panels * BytePanel<decltype(cell)>{sizes}.floats();
  });
}

static void round(int32_t cell, int64_t I_or_V, int64_t H, const float* packed, float* rounded) {
  if (cell == -1) return round_head(Head{I_or_V, H}, packed, rounded);
  of_model(cell, [=](auto cell) { round_layer<decltype(cell)>(I_or_V, H, packed, rounded); });
}

static void apply(int32_t function, int64_t n, const float* x, float* y) {
  FlushSubnormals flush;
  if (function > 2) {
    for (int64_t i = 0; i < n; ++i) {
      double e;
      exponentials(x + i, 1, 0.0, 1.0, &e);
      y[i] = function == 3 ? float(e) : float(e - double(float(e)));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += W) {
    int count = int(smaller(n - i, W));
    V v = load_part(x + i, count);
    store_part(y + i, function == 0 ? exponential(v) : function == 1 ? tanh(v) : sigmoid(v), count);
  }
}

}  // namespace LS_TARGET

#define LS_JOIN(a, b) LS_PASTE(a, b)
#define LS_PASTE(a, b) a##b
#define LS_QUOTE(a) LS_TEXT(a)
#define LS_TEXT(a) #a
extern const Target LS_JOIN(target_, LS_TARGET);
const Target LS_JOIN(target_, LS_TARGET) = {
    LS_QUOTE(LS_TARGET),      LS_TARGET::forward,     LS_TARGET::backward,      LS_TARGET::saved_floats,
    LS_TARGET::gates,         LS_TARGET::packed_floats, LS_TARGET::pack,        LS_TARGET::decode,
    LS_TARGET::read,          LS_TARGET::read_tree,   LS_TARGET::table_floats, LS_TARGET::head_floats,  LS_TARGET::pack_table_of,
    LS_TARGET::rounded_floats, LS_TARGET::round,      LS_TARGET::pack_head,     LS_TARGET::loss,
    LS_TARGET::apply,
};

}  // namespace ls
