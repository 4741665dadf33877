/* All kernels of one target. Compiled once for each, with LS_TARGET its name. */

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "gates.h"
#include "output.h"

namespace ls {
namespace LS_TARGET {

template <template <class> class Pass, class Args>
static int32_t run(const Args* args) {
  switch (args->shape.cell) {
    case LS_RNN_TANH: return Pass<RnnTanh>(*args).run();
    case LS_RNN_RELU: return Pass<RnnRelu>(*args).run();
    case LS_GRU: return Pass<Gru>(*args).run();
    default: return Pass<Lstm>(*args).run();
  }
}

static int32_t forward(const ls_forward_args* args) { return run<Forward>(args); }
static int32_t backward(const ls_backward_args* args) { return run<Backward>(args); }

template <class Cell>
static int64_t saved_floats_of(const ls_shape& shape, bool normal) {
  int64_t row = Sizes<Cell>(shape.I, shape.H).U * saved_vectors<Cell>(normal) * W + (normal ? kRowMoments : 0);
  return Steps(shape).total_rows() * row;
}

static int64_t saved_floats(const ls_shape* shape, bool normal) {
  switch (shape->cell) {
    case LS_GRU: return saved_floats_of<Gru>(*shape, normal);
    case LS_LSTM: return saved_floats_of<Lstm>(*shape, normal);
    default: return saved_floats_of<RnnTanh>(*shape, normal);
  }
}

static void gates(const ls_shape* shape, bool normal, const float* saved, float* out) {
  switch (shape->cell) {
    case LS_GRU: return lay_out_gates<Gru>(*shape, normal, saved, out);
    case LS_LSTM: return lay_out_gates<Lstm>(*shape, normal, saved, out);
    default: return; /* an RNN has none */
  }
}

template <class Cell>
static int64_t packed_floats_of(int64_t I, int64_t H) {
  Sizes<Cell> sizes(I, H);
  return sizes.panels * sizes.panel_floats();
}

static int64_t packed_floats(int32_t cell, int64_t I, int64_t H) {
  switch (cell) {
    case LS_GRU: return packed_floats_of<Gru>(I, H);
    case LS_LSTM: return packed_floats_of<Lstm>(I, H);
    default: return packed_floats_of<RnnTanh>(I, H);
  }
}

template <class Cell>
static void pack_all(int64_t I, int64_t H, const float* weight_ih, const float* weight_hh, const float* bias_ih,
                     const float* bias_hh, float* packed) {
  FlushSubnormals flush;
  Sizes<Cell> sizes(I, H);
  for (int64_t panel = 0; panel < sizes.panels; ++panel)
    pack_panel<Cell>(sizes, panel, weight_ih, weight_hh, bias_ih, bias_hh, packed);
}

static void pack(int32_t cell, int64_t I, int64_t H, const float* weight_ih, const float* weight_hh, const float* bias_ih,
                 const float* bias_hh, float* packed) {
  switch (cell) {
    case LS_GRU: return pack_all<Gru>(I, H, weight_ih, weight_hh, bias_ih, bias_hh, packed);
    case LS_LSTM: return pack_all<Lstm>(I, H, weight_ih, weight_hh, bias_ih, bias_hh, packed);
    default: return pack_all<RnnTanh>(I, H, weight_ih, weight_hh, bias_ih, bias_hh, packed);
  }
}

template <template <class> class Pass, class Args>
static int32_t run_model(const Args* args) {
  switch (args->model.cell) {
    case LS_RNN_TANH: return Pass<RnnTanh>(*args).run();
    case LS_RNN_RELU: return Pass<RnnRelu>(*args).run();
    case LS_GRU: return Pass<Gru>(*args).run();
    default: return Pass<Lstm>(*args).run();
  }
}

static int32_t read(const ls_read_args* args) { return run_model<Read>(args); }
static int32_t decode(const ls_decode_args* args) { return run_model<Decode>(args); }
static int32_t loss(const ls_loss_args* args) { return Loss(*args).run(); }

template <class Cell>
static int64_t table_floats_of(int64_t symbols, int64_t H) {
  return symbols * Sizes<Cell>(0, H).panels * Sizes<Cell>::N * W;
}

static int64_t table_floats(int32_t cell, int64_t symbols, int64_t H) {
  switch (cell) {
    case LS_GRU: return table_floats_of<Gru>(symbols, H);
    case LS_LSTM: return table_floats_of<Lstm>(symbols, H);
    default: return table_floats_of<RnnTanh>(symbols, H);
  }
}

static void pack_table_of(int32_t cell, int64_t symbols, int64_t H, const float* rows, float* table) {
  switch (cell) {
    case LS_GRU: return pack_table<Gru>(symbols, H, rows, table);
    case LS_LSTM: return pack_table<Lstm>(symbols, H, rows, table);
    default: return pack_table<RnnTanh>(symbols, H, rows, table);
  }
}

static int64_t head_floats(int64_t V, int64_t H) { return Head{V, H}.panels() * Head{V, H}.panel_floats(); }

static void pack_head(int64_t V, int64_t H, const float* weight, const float* bias, float* head) {
  const Head layer{V, H};
  layer.pack(weight, bias, head, 0, layer.panels());
}

template <class Cell>
static int64_t rounded_floats_of(int64_t I, int64_t H) {
  Sizes<Cell> sizes(I, H);
  return sizes.panels * BytePanel<Cell>{sizes}.floats();
}

static int64_t rounded_floats(int32_t cell, int64_t I_or_V, int64_t H) {
  switch (cell) {
    case -1: return Head{I_or_V, H}.panels() * head_bytes({I_or_V, H});
    case LS_GRU: return rounded_floats_of<Gru>(I_or_V, H);
    case LS_LSTM: return rounded_floats_of<Lstm>(I_or_V, H);
    default: return rounded_floats_of<RnnTanh>(I_or_V, H);
  }
}

static void round(int32_t cell, int64_t I_or_V, int64_t H, const float* packed, float* rounded) {
  switch (cell) {
    case -1: return round_head(Head{I_or_V, H}, packed, rounded);
    case LS_GRU: return round_layer<Gru>(I_or_V, H, packed, rounded);
    case LS_LSTM: return round_layer<Lstm>(I_or_V, H, packed, rounded);
    default: return round_layer<RnnTanh>(I_or_V, H, packed, rounded);
  }
}

static void apply(int32_t function, int64_t n, const float* x, float* y) {
  FlushSubnormals flush;
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
    LS_TARGET::read,          LS_TARGET::table_floats, LS_TARGET::head_floats,  LS_TARGET::pack_table_of,
    LS_TARGET::rounded_floats, LS_TARGET::round,      LS_TARGET::pack_head,     LS_TARGET::loss,
    LS_TARGET::apply,
};

}  // namespace ls
