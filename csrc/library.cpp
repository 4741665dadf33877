/* The C interface: checks what can be checked without reading the arrays, and calls the target. */

#include <stdlib.h>

#if defined(LS_HAVE_AMX) || defined(LS_HAVE_AMX_BF16X3) || defined(LS_HAVE_AMX_BF16)
#define LS_HAVE_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "internal.h"

namespace ls {

#if defined(LS_HAVE_AVX512)
extern const Target target_avx512;
#endif
#if defined(LS_HAVE_AVX512_BF16)
extern const Target target_avx512_bf16;
#endif
#if defined(LS_HAVE_AMX)
extern const Target target_amx;
#endif
#if defined(LS_HAVE_AMX_BF16X3)
extern const Target target_amx_bf16x3;
#endif
#if defined(LS_HAVE_AMX_BF16)
extern const Target target_amx_bf16;
#endif
#if defined(LS_HAVE_AVX2)
extern const Target target_avx2;
#endif
extern const Target target_baseline;

bool multiplies_bytes() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool third_level_is_near() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

namespace {

const Target* const kTargets[] = {
#if defined(LS_HAVE_AVX512)
    &target_avx512,
#endif
#if defined(LS_HAVE_AVX2)
    &target_avx2,
#endif
    &target_baseline,
/* Last, so that nobody gets them who has not asked: */
#if defined(LS_HAVE_AMX)
    &target_amx,
#endif
#if defined(LS_HAVE_AMX_BF16X3)
    &target_amx_bf16x3,
#endif
#if defined(LS_HAVE_AMX_BF16)
    &target_amx_bf16,
#endif
#if defined(LS_HAVE_AVX512_BF16)
    &target_avx512_bf16,
#endif
};
constexpr int32_t kNumTargets = sizeof kTargets / sizeof kTargets[0];

#if defined(LS_HAVE_UNITS)

/* Whether the processor has matrix units and Linux lets this process use them, for which it has to be asked once. */
bool has_matrix_units() {
  static const bool has = [] {
    constexpr long kAsk = 0x1023, kTileData = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return has;
}

#endif

/* Whether processor and system have what the target's build assumes; GCC and Clang also ask the system (XGETBV). */
bool supported(int32_t target) {
#if defined(__x86_64__)
  const char* name = kTargets[target]->name;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (!__builtin_strcmp(name, "avx2")) return avx2;
  if (!__builtin_strcmp(name, "avx512")) return avx512;
#if defined(LS_HAVE_UNITS) || defined(LS_HAVE_AVX512_BF16)
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (!__builtin_strcmp(name, "avx512_bf16")) return bf16;
#endif
#if defined(LS_HAVE_UNITS)
  if (!__builtin_strncmp(name, "amx", 3)) return bf16 && has_matrix_units();
#endif
#else
  (void)target;
#endif
  return true;
}

int32_t active = -1;

int32_t active_target() {
  int32_t target = __atomic_load_n(&active, __ATOMIC_RELAXED);
  if (target >= 0) return target;
  for (target = 0; !supported(target);) ++target;
  __atomic_store_n(&active, target, __ATOMIC_RELAXED);
  return target;
}

/* NULL where the target does not exist or cannot run here. */
const Target* find(int32_t target) {
  if (target < -1 || target >= kNumTargets) return nullptr;
  if (target == -1) return kTargets[active_target()];
  return supported(target) ? kTargets[target] : nullptr;
}

bool is_size(int64_t n) { return n >= 0 && n <= INT32_MAX; }

/* a * b stays far from overflow, also times the bytes and gates of a unit. */
bool fits(int64_t a, int64_t b) { return b == 0 || a <= (int64_t(1) << 52) / b; }

bool is_cell(int32_t cell) { return cell >= LS_RNN_TANH && cell <= LS_LSTM_COUPLED; }
bool is_cell_of_model(int32_t cell) { return is_cell(cell) && cell <= LS_LSTM; }
bool are_widths(int64_t I, int64_t H) { return is_size(I) && is_size(H) && H > 0 && fits(I + 64, H) && fits(H + 64, H); }

/* Whether `order` holds each of 0..B-1 once. */
bool is_permutation(const int64_t* order, int64_t B) {
  if (!B) return true;
  unsigned char* seen = static_cast<unsigned char*>(calloc(size_t(B), 1));
  bool good = seen != nullptr;
  for (int64_t row = 0; good && row < B; ++row) good = order[row] >= 0 && order[row] < B && !seen[order[row]]++;
  free(seen);
  return good;
}

/* Whether a layer of the cell may have an h that is P wide. */
bool is_projection(int32_t cell, int64_t H, int64_t P) { return P == 0 || (cell >= LS_LSTM && are_widths(P, H)); }

bool is_layer(int32_t cell, int64_t I, int64_t H, int64_t P) {
  return is_cell(cell) && are_widths(I, H) && is_projection(cell, H, P);
}

bool are_weights(const ls_weights& w) {
  return is_layer(w.cell, w.I, w.H, w.P) && (w.weight_ih || !w.I) && w.weight_hh && (w.weight_hr || !w.P);
}

bool is_shape(const ls_shape& s) {
  if (!is_layer(s.cell, s.I, s.H, s.P) || !is_size(s.T) || !is_size(s.B)) return false;
  if (!fits(s.T, s.B) || !fits(s.T * s.B, s.I + 8 * s.H + s.P + 64)) return false;
  if (s.counts)
    for (int64_t t = 0; t < s.T; ++t)
      if (s.counts[t] < 0 || s.counts[t] > (t ? s.counts[t - 1] : s.B)) return false;
  if (s.starts)
    for (int64_t t = 0; t < s.T; ++t)
      if (s.starts[t] < 0) return false;
  return s.num_threads >= 1 && (!s.order || is_permutation(s.order, s.B));
}

/* Whether there is no step at all: then nothing but states and padding is read or written. */
bool is_empty(const ls_shape& s) { return s.T == 0 || s.B == 0 || (s.counts && s.counts[0] == 0); }

bool are_options(const ls_options& o, int32_t cell) {
  bool lstm = cell >= LS_LSTM, coupled = cell == LS_LSTM_COUPLED;
  bool peeps = lstm && o.weight_cf && o.weight_co && coupled == !o.weight_ci;
  bool none = !o.weight_ci && !o.weight_cf && !o.weight_co;
  bool normal = o.gamma_ih && o.gamma_hh && (!lstm || (o.gamma_c && o.beta_c));
  bool plain = !o.gamma_ih && !o.gamma_hh && !(lstm && (o.gamma_c || o.beta_c));
  return o.zoneout >= 0.0f && o.zoneout <= 1.0f && (normal || plain) && (peeps || none);
}

/* Whether there is no table, or one that goes with the shape. */
bool are_tokens(const ls_tokens& tokens, const ls_shape& s, bool table) {
  if (!table) return true;
  if (s.I || !tokens.ids || !is_size(tokens.V) || !fits(tokens.V + 1, 4 * s.H)) return false;
  for (int64_t i = 0; i < s.T * s.B; ++i)
    if (tokens.ids[i] < 0 || tokens.ids[i] > tokens.V) return false;
  return true;
}

bool is_model(const ls_model& m) {
  bool sizes = m.V > 0 && is_size(m.V) && is_size(m.E) && is_size(m.layers) && m.layers > 0 && m.layers <= 1024;
  if (!is_cell_of_model(m.cell) || !sizes || !are_widths(m.V, m.H) || !are_widths(m.E, m.H)) return false;
  if (!(m.table || (m.embedding && m.E > 0)) || !m.packed || !m.head) return false;
  for (int64_t layer = 0; layer < m.layers; ++layer)
    if (!m.packed[layer]) return false;
  for (int64_t i = 0; m.gains && i < 4 * m.layers; ++i)
    if (!m.gains[i] && (i % 4 < 2 || m.cell == LS_LSTM)) return false;
  return true;
}

/* Whether a model can read so many steps of so many texts. */
bool are_texts(const ls_model& m, int64_t B, int64_t steps, int32_t threads) {
  return is_model(m) && is_size(B) && is_size(steps) && threads >= 1 && fits(B, steps) &&
         fits(B, m.layers * (m.H + 64) + m.V + m.E);
}

bool is_sampling(const ls_sampling& s) {
  return s.temperature >= 0.0 && s.temperature <= 1e6 && s.top_p >= 0.0 && s.top_p <= 1.0 && s.top_k >= 0 && s.position >= 0;
}

bool can_run(const ls_forward_args& a) {
  const ls_shape& s = a.shape;
  if (!is_shape(s) || !are_options(a.options, s.cell) || !are_tokens(a.tokens, s, a.tokens.table) || !find(s.target)) return false;
  const bool empty = is_empty(s), has_rows = s.T && s.B && !(empty && s.starts); /* of y, also beyond rows' ends */
  const bool lying = (a.weight_ih || !s.I) && a.weight_hh && (a.weight_hr || !s.P);
  return (empty || ((a.packed || lying) && (a.x || !s.I))) && (!has_rows || a.y);
}

bool can_run(const ls_backward_args& a) {
  const ls_shape& s = a.shape;
  if (!is_shape(s) || !are_options(a.options, s.cell) || !are_tokens(a.tokens, s, a.dtable) || !find(s.target)) return false;
  const bool weights = (a.weight_ih || !s.I || !a.dx) && a.weight_hh && (a.weight_hr || !s.P);
  return is_empty(s) || (a.saved && a.y && (a.x || !s.I) && weights);
}

bool are_alike(const ls_forward_args& a, const ls_forward_args& b) { return !a.packed == !b.packed && !a.saved == !b.saved; }
bool are_alike(const ls_backward_args& a, const ls_backward_args& b) {
  const bool same_dx = a.dx && a.dx == b.dx, same_table = a.dtable && a.dtable == b.dtable;
  return (!same_dx || b.accumulate_dx) && !same_table;
}

/* Whether these are calls of one direction of a layer, or of two, that can be run. */
template <class Args>
bool are_directions(const Args* args, int32_t count) {
  if (!args || count < 1 || count > 2 || !can_run(args[0])) return false;
  if (count == 1) return true;
  const ls_shape &a = args[0].shape, &b = args[1].shape;
  return can_run(args[1]) && are_alike(args[0], args[1]) && a.T == b.T && a.B == b.B && a.I == b.I && a.H == b.H && a.P == b.P &&
         a.cell == b.cell && a.counts == b.counts && a.starts == b.starts && a.order == b.order &&
         a.num_threads == b.num_threads && a.target == b.target;
}

/* `sum` with `count` values mixed in, spread over all n. */
uint64_t sample(const float* values, int64_t n, int64_t count, uint64_t sum) {
  for (int64_t i = 0; i < count && n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + (n - 1) * i / (count - 1), sizeof bits);
    sum = (sum ^ bits) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 29;
  }
  return sum;
}

}  // namespace
}  // namespace ls

using namespace ls;

extern "C" {

int32_t ls_abi_version(void) { return LS_ABI_VERSION; }
int32_t ls_num_targets(void) { return kNumTargets; }
const char* ls_target_name(int32_t target) { return target >= 0 && target < kNumTargets ? kTargets[target]->name : nullptr; }
int32_t ls_target_supported(int32_t target) { return target >= 0 && target < kNumTargets && supported(target); }
int32_t ls_active_target(void) { return active_target(); }

int32_t ls_set_target(int32_t target) {
  if (!ls_target_supported(target)) return LS_BAD_ARGUMENT;
  __atomic_store_n(&active, target, __ATOMIC_RELAXED);
  return LS_OK;
}

int32_t ls_set_threading(int32_t openmp) { return set_threading(openmp != 0) ? LS_OK : LS_BAD_ARGUMENT; }
int32_t ls_threading(void) { return uses_openmp(); }

double ls_handover(void) { return handover(); }

int64_t ls_saved_floats(const ls_shape* shape, int32_t layer_norm) {
  const Target* target = shape && is_shape(*shape) ? find(shape->target) : nullptr;
  return target ? target->saved_floats(shape, layer_norm != 0) : -1;
}

int64_t ls_packed_floats(int32_t cell, int64_t I, int64_t H, int64_t P, int32_t target) {
  const Target* found = is_layer(cell, I, H, P) ? find(target) : nullptr;
  return found ? found->packed_floats(cell, I, H, P) : -1;
}

int32_t ls_pack(const ls_weights* weights, int32_t target, float* packed) {
  const Target* found = find(target);
  if (!found || !weights || !are_weights(*weights) || !packed) return LS_BAD_ARGUMENT;
  const ls_weights& w = *weights;
  found->pack(w.cell, w.I, w.H, w.P, w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh, w.weight_hr, packed);
  return LS_OK;
}

uint64_t ls_sample(const ls_weights* weights) {
  if (!weights || !are_weights(*weights)) return 0;
  const ls_weights& w = *weights;
  int64_t rows = (w.cell == LS_LSTM ? 4 : w.cell >= LS_GRU ? 3 : 1) * w.H;
  uint64_t sum = sample(w.weight_ih, rows * w.I, 64, 1);
  sum = sample(w.weight_hh, rows * (w.P ? w.P : w.H), 64, sum);
  sum = sample(w.weight_hr, w.P * w.H, 64, sum);
  sum = sample(w.bias_ih, w.bias_ih ? rows : 0, 8, sum);
  return sample(w.bias_hh, w.bias_hh ? rows : 0, 8, sum);
}

int32_t ls_forward(const ls_forward_args* args, int32_t count) {
  return are_directions(args, count) ? find(args->shape.target)->forward(args, count) : LS_BAD_ARGUMENT;
}

int32_t ls_backward(const ls_backward_args* args, int32_t count) {
  return are_directions(args, count) ? find(args->shape.target)->backward(args, count) : LS_BAD_ARGUMENT;
}

int32_t ls_gates(const ls_shape* shape, int32_t layer_norm, const float* saved, float* gates) {
  const Target* target = shape && is_shape(*shape) ? find(shape->target) : nullptr;
  if (!target) return LS_BAD_ARGUMENT;
  bool nothing = shape->T == 0 || shape->B == 0 || shape->cell < LS_GRU;
  if (nothing) return LS_OK;
  if ((!saved && !is_empty(*shape)) || !gates) return LS_BAD_ARGUMENT;
  target->gates(shape, layer_norm != 0, saved, gates);
  return LS_OK;
}

int64_t ls_table_floats(int32_t cell, int64_t V, int64_t H, int32_t target) {
  const Target* found = is_cell_of_model(cell) && V > 0 && are_widths(V, H) ? find(target) : nullptr;
  return found ? found->table_floats(cell, V + 1, H) : -1;
}

int64_t ls_head_floats(int64_t V, int64_t H, int32_t target) {
  const Target* found = V > 0 && are_widths(V, H) ? find(target) : nullptr;
  return found ? found->head_floats(V, H) : -1;
}

int32_t ls_pack_table(int32_t cell, int64_t V, int64_t H, int32_t target, const float* rows, float* table) {
  const Target* found = is_cell_of_model(cell) && V > 0 && are_widths(V, H) ? find(target) : nullptr;
  if (!found || !rows || !table) return LS_BAD_ARGUMENT;
  found->pack_table(cell, V + 1, H, rows, table);
  return LS_OK;
}

int32_t ls_pack_head(int64_t V, int64_t H, int32_t target, const float* weight, const float* bias, float* head) {
  const Target* found = V > 0 && are_widths(V, H) ? find(target) : nullptr;
  if (!found || !weight || !bias || !head) return LS_BAD_ARGUMENT;
  found->pack_head(V, H, weight, bias, head);
  return LS_OK;
}

int64_t ls_rounded_floats(int32_t cell, int64_t I_or_V, int64_t H, int32_t target) {
  bool sizes = (is_cell_of_model(cell) || (cell == -1 && I_or_V > 0)) && are_widths(I_or_V, H);
  sizes = sizes && H <= kDeepestBytes && (cell == -1 || I_or_V <= kDeepestBytes);
  const Target* found = sizes ? find(target) : nullptr;
  return found ? found->rounded_floats(cell, I_or_V, H) : -1;
}

int32_t ls_round(int32_t cell, int64_t I_or_V, int64_t H, int32_t target, const float* packed, float* rounded) {
  if (ls_rounded_floats(cell, I_or_V, H, target) < 0 || !packed || !rounded) return LS_BAD_ARGUMENT;
  find(target)->round(cell, I_or_V, H, packed, rounded);
  return LS_OK;
}

int32_t ls_read(const ls_read_args* args) {
  if (!args || !are_texts(args->model, args->B, args->T, args->num_threads)) return LS_BAD_ARGUMENT;
  const ls_model& model = args->model;
  const Target* target = find(model.target);
  if (!target) return LS_BAD_ARGUMENT;
  int64_t count = args->T * args->B;
  if (count == 0) return LS_OK;
  if (!args->ids || (args->nats && !args->targets) || !args->h || (model.cell == LS_LSTM && !args->c)) return LS_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; ++i) {
    if (args->ids[i] < 0 || args->ids[i] > model.V) return LS_BAD_ARGUMENT;
    if (args->nats && args->targets[i] >= model.V) return LS_BAD_ARGUMENT;
  }
  return target->read(args);
}

int32_t ls_read_tree(const ls_tree_args* args) {
  if (!args || !is_size(args->levels)) return LS_BAD_ARGUMENT;
  const ls_tree_args& a = *args;
  const Target* target = find(a.model.target);
  if (!target || (a.levels && (!a.nodes || !a.reads))) return LS_BAD_ARGUMENT;
  int64_t node = 0, above = 0, most = 0;
  for (int64_t level = 0; level < a.levels; ++level) {
    if (!is_size(a.nodes[level]) || a.reads[level] < 0 || a.reads[level] > a.nodes[level]) return LS_BAD_ARGUMENT;
    if (a.nodes[level] && (!a.ids || !a.nats || (level && !a.parents))) return LS_BAD_ARGUMENT;
    for (const int64_t end = node + a.nodes[level]; node < end; ++node) {
      if (a.ids[node] < 0 || a.ids[node] > a.model.V) return LS_BAD_ARGUMENT;
      if (level && (a.parents[node] < 0 || a.parents[node] >= above)) return LS_BAD_ARGUMENT;
    }
    above = a.reads[level];
    most = most > above ? most : above;
  }
  if (!are_texts(a.model, most, a.levels, a.num_threads)) return LS_BAD_ARGUMENT;
  for (int64_t i = 0; i < node; ++i) a.nats[i] = 0.0;
  return most ? target->read_tree(args) : LS_OK;
}

int32_t ls_decode(const ls_decode_args* args) {
  if (!args || !are_texts(args->model, args->B, args->steps, args->num_threads)) return LS_BAD_ARGUMENT;
  const ls_model& model = args->model;
  const Target* target = find(model.target);
  if (!target) return LS_BAD_ARGUMENT;
  if (args->B == 0 || args->steps == 0) return LS_OK;
  if (!args->sampling || !args->logits || !args->h || !args->ids || (model.cell == LS_LSTM && !args->c)) return LS_BAD_ARGUMENT;
  for (int64_t row = 0; row < args->B; ++row)
    if (!is_sampling(args->sampling[row])) return LS_BAD_ARGUMENT;
  return target->decode(args);
}

int32_t ls_loss(const ls_loss_args* args) {
  if (!args || args->V <= 0 || !are_widths(args->V, args->H) || !is_size(args->N)) return LS_BAD_ARGUMENT;
  const Target* target = find(args->target);
  const ls_loss_args& a = *args;
  bool sizes = fits(a.N, a.H + 64) && fits(a.N, a.V + 64) && a.num_threads >= 1;
  if (!target || !sizes || !a.dweight || !a.dbias) return LS_BAD_ARGUMENT;
  if (a.N && (!a.h || !a.weight || !a.bias || !a.targets || !a.nats || !a.dh)) return LS_BAD_ARGUMENT;
  for (int64_t i = 0; i < a.N; ++i)
    if (a.targets[i] >= a.V) return LS_BAD_ARGUMENT;
  return target->loss(args);
}

int32_t ls_apply(int32_t function, int32_t target, int64_t n, const float* x, float* y) {
  const Target* found = find(target);
  if (!found || function < 0 || function > 4 || n < 0 || (n && (!x || !y))) return LS_BAD_ARGUMENT;
  found->apply(function, n, x, y);
  return LS_OK;
}

void ls_prefer_large_pages(void* memory, int64_t bytes) {
  if (memory && bytes > 0) prefer_large_pages(memory, size_t(bytes));
}

void ls_trim(void) { trim(); }

}  // extern "C"
