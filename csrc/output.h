/* The output layer: its panels, and its loss with all gradients.

   Loss of N rows, a chunk of them at a time, so that the logits stay near:

     chunk:  logits = h W^T + b -> e^(logit - largest), their sum -> nats, dlogits -> dh = dlogits W      (own rows)   | all wait |
             dW += dlogits^T h,  db += sum of dlogits  (own symbols)                                                   | all wait |

   A row's figures are the same with any number of threads and rows. */

#ifndef LONGSHORT_OUTPUT_H
#define LONGSHORT_OUTPUT_H

#include "layout.h"

namespace ls {
namespace LS_TARGET {

/* The output layer's panels: biases, then [k][vectors][W]. */
constexpr int kHeadVectors = 2;

struct Head {
  int64_t symbols, H;
  int64_t panels() const { return ceil_div(symbols, kHeadVectors * W); }
  int64_t blocks() const { return ceil_div(H, W); }
  template <class F>
  int64_t panel_floats() const {
    return (1 + F::padded(blocks()) * F::S) * kHeadVectors * W;
  }
  int64_t width() const { return panels() * kHeadVectors * W; }

  template <class F>
  void pack(const float* weight, const float* bias, float* packed, int64_t begin, int64_t end) const {
    packed += begin * panel_floats<F>();
    for (int64_t panel = begin; panel < end; ++panel, packed += panel_floats<F>())
      for (int n = 0; n < kHeadVectors; ++n) {
        int64_t first = (panel * kHeadVectors + n) * W;
        int rows = int(larger(smaller(symbols - first, W), 0));
        store(packed + n * W, rows ? load_part(bias + first, rows) : V{});
        transpose_block<F>(weight + (rows ? first : 0) * H, H, rows, H, packed + kHeadVectors * W + n * F::kWide,
                           kHeadVectors * F::kWide);
      }
  }
};

/* The logarithm of the sum of e^logit. Sums of a vector's lanes are in float, over the vectors in double. */
static inline double log_sum(const float* logits, int64_t n) {
  const float largest = largest_of(logits, n);
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += W) {
    int count = int(smaller(n - i, W));
    sum += double(sum_lanes(first_lanes(exponential(load_part(logits + i, count) - largest), count)));
  }
  return double(largest) + logarithm(sum);
}

template <class F>
struct Loss {
  using O = Outer<F>;
  static constexpr int kWidth = kHeadVectors * W;
  static constexpr int64_t kLogits = 1 << 23; /* floats of logits at a time: 32 MB */
  static constexpr int64_t kSummed = 32;      /* vectors whose lanes are summed in float */

  const ls_loss_args& a;
  const Head head;
  int64_t N, H, blocks; /* of symbols */
  int64_t chunk, room;  /* rows at a time, and those that a block has room for */
  int threads;

  /* Shared scratch. */
  float* packed;     /* the head's panels: products with h */
  float* by_columns; /* [panel][symbol][kPanel]: products with dlogits */
  float* x;          /* the chunk's h, as a left factor */
  float* columns;    /* and as the weights' gradients multiply it */
  float* logits;     /* then their gradients, blocked [block of symbols][row][W] */
  float* left;       /* as a left factor: themselves where factors are floats */
  float* right;      /* as the weights' gradients multiply them, by `store_rows` */
  float* largest;    /* [row][W]: of each lane */
  double* sums;      /* of e^(logit - largest), by row */
  float* factors;    /* what turns that e^... into the gradient: scale / sum */
  float* dh;         /* [panel][row][kPanel] */
  Team::Shared* shared;

  explicit Loss(const ls_loss_args& args)
      : a(args), head{args.V, args.H}, N(args.N), H(args.H), blocks(ceil_div(args.V, W)) {
    chunk = smaller(larger(smaller(kLogits / head.width(), 512), 24), larger(N, 1));
    room = odd(chunk);
    double flops = 6.0 * double(N) * double(a.V) * double(H);
    threads = useful_threads(int(smaller(a.num_threads, larger(N, 1))), flops, 2.0 * double(ceil_div(N, chunk)));
  }

  int64_t carve(float* memory) {
    Arena arena(memory);
    packed = arena.array(head.panels() * panel_floats());
    by_columns = arena.array(ceil_div(H, kPanel) * F::padded(blocks) * F::S * kPanel);
    x = arena.array(F::left_floats(head.blocks(), room));
    columns = arena.array(O::floats(H, chunk));
    logits = left = right = arena.array(head.panels() * kHeadVectors * room * W);
    if constexpr (!F::kFloats) {
      left = arena.array(F::left_floats(blocks, room));
      right = arena.array(blocks * O::group_floats(chunk));
    }
    largest = arena.array(chunk * W);
    sums = reinterpret_cast<double*>(arena.array(2 * chunk));
    factors = arena.array(chunk);
    dh = arena.array(ceil_div(H, kPanel) * room * kPanel);
    shared = reinterpret_cast<Team::Shared*>(arena.array(int64_t(sizeof(Team::Shared) / 4)));
    return arena.floats();
  }

  int32_t run() {
    if (N == 0) {
      clear(a.dweight, a.V * H);
      clear(a.dbias, a.V);
      return LS_OK;
    }
    int64_t floats = carve(nullptr);
    float* memory = static_cast<float*>(take(size_t(floats) * sizeof(float)));
    if (!memory) return LS_OUT_OF_MEMORY;
    must_be(carve(memory) == floats);
    clear(reinterpret_cast<float*>(shared), int64_t(sizeof(Team::Shared) / 4));
    parallel(
        threads, a.num_threads,
        [](void* context, int thread, int count) { static_cast<Loss*>(context)->work(thread, count); }, this);
    give(memory);
    return LS_OK;
  }

  void work(int thread, int count) {
    FlushSubnormals flush;
    MatrixUnit unit;
    Team team(shared, thread, count);
    head.template pack<F>(a.weight, a.bias, packed, team.begin(head.panels()), team.end(head.panels()));
    const int64_t panels = ceil_div(H, kPanel);
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) pack_columns(panel);
    if (!team.wait()) return;
    for (int64_t first = 0; first < N; first += chunk) {
      const int64_t rows = smaller(chunk, N - first);
      /* Rows that lie together in `columns` or in `right` belong to one thread. */
      const int64_t groups = ceil_div(rows, F::kWhole), begin = team.begin(groups) * F::kWhole;
      const int64_t end = smaller(team.end(groups) * F::kWhole, rows);
      if (begin < end) {
        copy_rows(first, rows, begin, end);
        multiply(begin, end);
        differentiate(first, begin, end);
        hidden_gradients(first, begin, end);
      }
      if (!team.wait()) return;
      weight_gradients(team, rows, first > 0);
      if (!team.wait()) return;
    }
  }

  void pack_columns(int64_t panel) {
    for (int64_t block = 0; block < F::padded(blocks); ++block)
      pack_deep_rows<F>(a.weight + block * W * H, symbols(block), H, panel * kPanel,
                     by_columns + (panel * F::padded(blocks) + block) * F::S * kPanel);
  }

  /* The chunk's rows [begin, end) of h, both ways. */
  void copy_rows(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* h = a.h + (first + row) * H;
      for (int64_t block = 0; block < F::padded(head.blocks()); ++block)
        F::store_left(F::left_at(x, room, block, row), row_block(h, H, block));
      O::store_columns(h, nullptr, H, row, rows, 0, O::panels(H), columns);
    }
    if (end == rows) O::fill_columns(H, rows, 0, O::panels(H), columns);
  }

  int64_t panel_floats() const { return head.template panel_floats<F>(); }
  int symbols(int64_t block) const { return int(larger(smaller(a.V - block * W, W), 0)); }

  /* Logits, and the largest of each lane. */
  void multiply(int64_t begin, int64_t end) {
    const V least = splat(-3e38f);
    for (int64_t row = begin; row < end; ++row) store(largest + row * W, least);
    Panels panels(packed + kWidth, panel_floats(), panel_floats(), head.panels(), 0);
    Tiles<F> tiles(end - begin, max_rows<F, kHeadVectors>());
    const Depth deep = F::depth_of(H);
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t row = begin + tiles.begin(tile), block = panel * kHeadVectors;
        float* out = logits + (block * room + row) * W;
        multiply_rows<F, kHeadVectors>(tiles.size(tile), deep, F::left_at(x, room, 0, row), room, panels.at(panel),
                                Place{const_cast<float*>(panels.at(panel)) - kWidth, 0, W}, Place{out, W, room * W},
                                panels.ahead(panel, tile, tiles.count, deep.blocks));
        for (int n = 0; n < kHeadVectors; ++n)
          for (int r = 0; r < tiles.size(tile); ++r) {
            float *p = out + (n * room + r) * W, *top = largest + (row + r) * W;
            V v = load(p), before = load(top);
            if (symbols(block + n) < W) store(p, v = first_lanes(v, symbols(block + n), least));
            store(top, v > before ? v : before);
          }
      }
  }

  float* logit(int64_t row, int64_t symbol) const { return logits + (symbol / W * room + row) * W + symbol % W; }

  /* Logits become their gradients, and the factors that are made of them. */
  void differentiate(int64_t first, int64_t begin, int64_t end) {
    const int64_t* targets = a.targets + first;
    for (int64_t row = begin; row < end; ++row) {
      float* lanes = largest + row * W;
      for (int lane = 1; lane < W; ++lane) lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
      sums[row] = 0.0;
      a.nats[first + row] = targets[row] < 0 ? 0.0 : double(lanes[0]) - double(*logit(row, targets[row]));
    }
    for (int64_t group = 0; group < blocks; group += kSummed)
      for (int64_t row = begin; row < end; ++row) {
        if (targets[row] < 0) continue;
        V sum{};
        for (int64_t block = group; block < smaller(group + kSummed, blocks); ++block) {
          float* p = logits + (block * room + row) * W;
          V e = exponential(load(p) - largest[row * W]);
          store(p, e);
          sum += e;
        }
        sums[row] += double(sum_lanes(sum));
      }
    for (int64_t row = begin; row < end; ++row) {
      if (targets[row] >= 0) a.nats[first + row] += logarithm(sums[row]);
      factors[row] = float(double(a.scale) / sums[row]);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t lane = targets[row] - block * W; /* of the target, if it is in this block */
        float* p = logits + (block * room + row) * W;
        V d = targets[row] < 0 ? V{} : load(p) * factors[row];
        store(p, d);
        if (lane >= 0 && lane < W) p[lane] -= a.scale;
        if constexpr (!F::kFloats) F::store_left(F::left_at(left, room, block, row), load(p));
      }
      if constexpr (!F::kFloats)
        F::store_rows(logits + (block * room + begin) * W, end - begin,
                      right + block * right_block() + O::group_floats(begin));
    }
    if constexpr (!F::kFloats) F::fill_left(left, blocks, room, begin, end);
  }

  int64_t right_block() const { return F::kFloats ? room * W : O::group_floats(chunk); }

  void hidden_gradients(int64_t first, int64_t begin, int64_t end) {
    const int64_t panels = ceil_div(H, kPanel);
    multiply_deep<F>(by_columns, F::depth_of(a.V), 0, panels, F::left_at(left, room, 0, begin), room, end - begin, 0,
                  Place{dh + begin * kPanel, kPanel, W}, room * kPanel);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < H; column += W)
        store_part(a.dh + (first + row) * H + column,
                   load(dh + (column / kPanel * room + row) * kPanel + column % kPanel), int(smaller(H - column, W)));
  }

  /* Own pieces of dW, and own symbols of db. */
  void weight_gradients(const Team& team, int64_t rows, bool add) {
    const int64_t panels = O::panels(H), pieces = ceil_div(blocks, O::kGroups) * panels;
    for (int64_t piece = team.begin(pieces); piece < team.end(pieces); ++piece) {
      const int64_t first = piece / panels * O::kGroups, column = piece % panels * O::kColumns;
      OuterRows of[O::kGroups] = {};
      for (int64_t block = first; block < smaller(first + O::kGroups, blocks); ++block)
        of[block - first] = {right + block * right_block(), a.dweight + block * W * H, symbols(block)};
      O::multiply_stripe(rows, of, columns, column, column + O::kColumns, H, add);
    }
    for (int64_t block = team.begin(blocks); block < team.end(blocks); ++block) {
      V sum{};
      for (int64_t row = 0; row < rows; ++row) sum += load(logits + (block * room + row) * W);
      float* to = a.dbias + block * W;
      store_part(to, add ? load_part(to, symbols(block)) + sum : sum, symbols(block));
    }
  }
};

}  // namespace LS_TARGET
}  // namespace ls

#endif
