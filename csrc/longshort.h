/* The kernel library of longshort: recurrent layers on a CPU, without torch and without Python.

   This header is the contract. One call runs one layer over a batch of sequences, or one step of it (T = 1), in one direction or
   in two. All numbers are float32; all matrices are row-major, as torch.nn lays them out. The targets avx512_bf16
   and amx_bf16 round the factors of their products to bfloat16, the nearest of 8 bits, ties to even. Calls of few rows that
   read the weights as they lie have factors of float32 there too. In the target amx forward passes that save, backward passes
   and losses of many rows multiply by matrix units, factors as sums of three numbers of bfloat16: the error is that of float32,
   but for numbers below 2^-110, of which digits are lost, and numbers that are not finite or above 3.38e38, which outside x make
   NaN of the sums that they are in. The target amx_bf16x3 multiplies everything so, factors as sums of two numbers of bfloat16 in
   three products: about 16 bits; what is beyond 3.38e38, infinity too, counts as that. These four are never active unless they
   are chosen. Whether those named amx are supported is asked once, and asks Linux for the use of the processor's matrix units.

     T  steps   B  sequences (rows)   I  input width   H  hidden units   G  gates: RNN 1, GRU 3 (r, z, n), LSTM 4 (i, f, g, o);
     of an LSTM whose gates are coupled 3 (f, g, o)   P  width of h: H, or what an LSTM projects it to

     RNN   h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or max(0, ...)
     GRU   r, z = sigmoid(...)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))    h' = (1 - z) n + z h
     LSTM  i, f, o = sigmoid(...)   g = tanh(...)   c' = f c + i g   h' = o tanh(c')        coupled: i = 1 - f;
           projected: h' = W_hr (o tanh(c'))

   Errors. exp, tanh and sigmoid are within 4 ULP where the exact result is a normal number, else within 2^-126.
   Inside a call subnormal numbers count as zero; the caller's floating-point mode is restored. A product sums over k in
   ascending order in one float32 accumulator, whatever the number of threads and of rows: a forward pass that saves nothing
   gives the same bits for a sequence alone and in any batch, with any number of threads, as long as the target stays the
   same. One that saves may sum a call of few rows in another order.

   Arguments. Pointers need the alignment of float only, need not be distinct where both are inputs, and no output may
   overlap another argument, except where it is said. NULL stands for what each comment says. Sizes may be 0 except H.
   Every function is safe to call from several threads at once. Scratch memory belongs to the library, which keeps some of
   it between calls. */

#ifndef LONGSHORT_H
#define LONGSHORT_H

#include <stdint.h>

#if defined(_WIN32)
#define LS_API __declspec(dllexport)
#else
#define LS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LS_ABI_VERSION 12

/* The last is a cell of layers, not of models. */
enum ls_cell { LS_RNN_TANH = 0, LS_RNN_RELU = 1, LS_GRU = 2, LS_LSTM = 3, LS_LSTM_COUPLED = 4 };

enum ls_status {
  LS_OK = 0,
  LS_OUT_OF_MEMORY = 1,
  LS_BAD_ARGUMENT = 2, /* a size below 0 or beyond 2^31, an unknown cell or target, counts that rise, ... */
};

/* Which steps of which sequences there are, and where they lie in x, y and their gradients.

   Step t of row r lies at base + (starts ? starts[t] * row : t * step) + r' * row, where r' = order ? order[r] : r, and is
   contiguous. (T, B, I): step = B I, row = I. (B, T, I): step = I, row = T I. torch's PackedSequence: starts.
   `counts` are for sequences of several lengths: the rows, put in descending length by `order`, so that the rows that
   step t has are the first counts[t]. The reversed direction starts each row at its own last step. */
typedef struct {
  int64_t T, B, I, H;
  int64_t P;             /* of an LSTM that projects h; 0: H, and h is not projected. Below, P is H then */
  const int64_t* counts; /* T, descending, each 0..B; NULL: B at every step */
  const int64_t* starts; /* T; NULL: by step */
  const int64_t* order;  /* B, a permutation of 0..B-1; NULL: as they are */
  int32_t cell;          /* enum ls_cell */
  int32_t reverse;       /* 0, or 1: from each row's last step to its first */
  int32_t num_threads;   /* at most so many, the caller's included; fewer where the work is small or a core is busy */
  int32_t target;        /* index into ls_target_name's list; -1: the active one */
} ls_shape;

/* Symbols in the place of x: each gives the gates a row of a table, which the caller has made of its embedding and W_ih. With a
   table I is 0, and x and W_ih are not read. */
typedef struct {
  const float* table; /* (V + 1) x G H, without biases; row V is of a symbol outside the vocabulary; NULL: x is read */
  const int64_t* ids; /* T x B, 0..V, rows as in the batch; also where a row has no step */
  int64_t V;
} ls_tokens;

/* What a direction may have beside its weights. All NULL or 0: a plain layer. */
typedef struct {
  const float* h_mask;       /* B x P: what h is multiplied by where W_hh reads it (recurrent dropout); NULL: 1 */
  const float* zoneout_mask; /* T x B x P, in the order of (T, B): h' = h' + mask (h - h'); NULL: the number below */
  float zoneout;             /* the same for every unit and step, from 0 to 1 */
  int32_t reserved;
  const uint8_t* resets;     /* T x B: where not 0, the row's state is zero before step t; NULL: nowhere */
  /* Layer normalisation: (W_ih x) and (W_hh h), each over its whole row of G H, become gamma (v - mean) / sqrt(variance +
     1e-5); the biases are added afterwards. The LSTM's output reads c normalised so, times gamma_c plus beta_c. All that
     the cell has, or none. */
  const float* gamma_ih;     /* G H */
  const float* gamma_hh;     /* G H */
  const float* gamma_c;      /* H, LSTM */
  const float* beta_c;       /* H, LSTM */
  /* Peepholes of an LSTM: i and f also see c times these, o sees c'. All that the cell has, or none. */
  const float* weight_ci;    /* H; not of coupled gates */
  const float* weight_cf;    /* H */
  const float* weight_co;    /* H */
} ls_options;

typedef struct {
  ls_shape shape;
  ls_options options;
  const float* x;
  int64_t x_step, x_row;
  const float* weight_ih; /* G H x I */
  const float* weight_hh; /* G H x P */
  const float* bias_ih;   /* G H; NULL: none */
  const float* bias_hh;   /* G H; NULL: none */
  const float* weight_hr; /* P x H, where h is projected */
  const float* packed;    /* what ls_pack made of the five above, which are not read then; NULL: packed in the call */
  const float* h0;        /* B x P, rows as in the batch; NULL: zeros */
  const float* c0;        /* B x H, LSTM; NULL: zeros */
  float* y;               /* P wide; rows past the end of a sequence are set to 0 unless there are `starts` */
  int64_t y_step, y_row;
  float* h_n;             /* B x P, after each row's last step; may be h0 itself; NULL: not wanted */
  float* c_n;             /* B x H, LSTM; may be c0 itself; NULL: not wanted */
  float* saved;           /* ls_saved_floats of them, for ls_backward; NULL: nothing is saved */
  ls_tokens tokens;
} ls_forward_args;

typedef struct {
  ls_shape shape;      /* as in the forward call; the target too */
  ls_options options;  /* as in the forward call */
  const float* x;
  int64_t x_step, x_row;
  const float* weight_ih;
  const float* weight_hh;
  const float* weight_hr;
  const float* h0;
  const float* c0;
  const float* y; /* what the forward call gave */
  int64_t y_step, y_row;
  const float* saved;
  const float* dy; /* NULL: zeros */
  int64_t dy_step, dy_row;
  const float* dh_n; /* B x P; NULL: zeros */
  const float* dc_n; /* B x H; NULL: zeros */
  const float* dgates; /* of what ls_gates lays out, laid out so; NULL: zeros */
  float* dx;         /* NULL: not wanted; past the end of a sequence set to 0 as y is */
  int64_t dx_step, dx_row;
  float* dweight_ih; /* G H x I; NULL: not wanted, as all below */
  float* dweight_hh; /* G H x P */
  float* dbias_ih;   /* G H */
  float* dbias_hh;   /* G H */
  float* dweight_hr; /* P x H */
  float* dh0;        /* B x P */
  float* dc0;        /* B x H */
  float* dgamma_ih;  /* G H; of layer normalisation, as the three below */
  float* dgamma_hh;  /* G H */
  float* dgamma_c;   /* H */
  float* dbeta_c;    /* H */
  float* dweight_ci; /* H; of peepholes, as the two below */
  float* dweight_cf; /* H */
  float* dweight_co; /* H */
  int32_t accumulate_dx; /* not 0: added to what is in dx, the first direction's too */
  int32_t reserved;
  ls_tokens tokens; /* as in the forward call; the table itself is not read */
  float* dtable;    /* (V + 1) x G H, with a table; NULL: not wanted */
} ls_backward_args;

/* A language model of one kind of cell: symbols 0..V-1, and V for one that is outside the vocabulary. */
typedef struct {
  int64_t V, E, H, layers;  /* E: width of the embedding; not read where there is a table */
  int32_t cell;             /* enum ls_cell */
  int32_t target;           /* of all that was packed; -1: the active one */
  int32_t int8; /* 1: layers and head are ls_round's, and what they read is rounded too, each row to 255 values; the table
                   stays float32. 2: the same bits without the processor's own instruction for products of bytes */
  int32_t residual;         /* not 0: each layer but the first adds what it reads to what it puts out; h is without it */
  const float* table;       /* ls_pack_table: what each of the V + 1 symbols gives the gates of the first layer; NULL: */
  const float* embedding;   /* V + 1 x E: what the first layer reads */
  const float* const* packed; /* ls_pack's, of each layer; of the first with I = 0 where there is a table, else I = E */
  const float* head;        /* ls_pack_head's */
  /* Layer normalisation, as in ls_options: of each layer gamma_ih, gamma_hh, and of an LSTM gamma_c and beta_c (else NULL), layers
     x 4. A table's rows are normalised already, and have biases. NULL: none. */
  const float* const* gains;
} ls_model;

/* How a text's symbols are chosen. The random number of symbol n is the first of Philox4x32-10 with key `seed` and counter
   (position, stream). */
typedef struct {
  double temperature; /* 0: the largest logit, the lower symbol of equals */
  double top_p;       /* the fewest symbols that hold this probability; 0: all */
  int64_t top_k;      /* the most probable; 0: all */
  uint64_t seed, stream;
  int64_t position;   /* of the first symbol that the call chooses */
} ls_sampling;

typedef struct {
  ls_model model;
  int64_t B, steps;            /* texts, and symbols to choose for each */
  const ls_sampling* sampling; /* B */
  float* logits;               /* B x V: of the next symbol. In and out, as the states */
  float* h;                    /* layers x B x H */
  float* c;                    /* layers x B x H, LSTM; NULL otherwise */
  int64_t* ids;                /* steps x B: the symbols chosen */
  int64_t newline;             /* a symbol before which the state is zero; -1: none */
  int32_t num_threads;         /* at most so many, the caller's included */
  int32_t reserved;
} ls_decode_args;

typedef struct {
  ls_model model;
  int64_t T, B;           /* steps and texts */
  const int64_t* ids;     /* T x B: what is read, 0..V */
  const int64_t* targets; /* T x B: the symbol that followed each, below V; below 0: of no interest; not read without nats */
  float* h;               /* layers x B x H: the states, in and out */
  float* c;               /* layers x B x H, LSTM; NULL otherwise */
  double* nats;           /* T x B: -log of the probability of each target, 0 where there is none; NULL: not wanted */
  float* logits;          /* B x V: of the symbol after the last (T 0: left as they are); NULL: not wanted */
  int32_t num_threads;    /* at most so many, the caller's included */
  int32_t reserved;
} ls_read_args;

/* Texts that begin alike, read once where they are: a tree of their prefixes. A node is a symbol behind those of the nodes above
   it. Nodes lie level by level, and of a level those first that have nodes below them: only they are read. */
typedef struct {
  ls_model model;
  int64_t levels;
  const int64_t* nodes;   /* levels: how many a level has */
  const int64_t* reads;   /* levels: how many of them have nodes below them */
  const int64_t* ids;     /* of each node its symbol, 0..V */
  const int64_t* parents; /* of each node the one above it, counted within its level; of the first level not read: its nodes
                             begin from a zero state */
  double* nats;           /* of each node -log of the probability of its symbol; 0 of the first level, and where that is V */
  int32_t num_threads;    /* at most so many, the caller's included */
  int32_t reserved;
} ls_tree_args;

/* N rows that an output layer of V symbols reads: p = softmax(W h + b), loss = scale * sum of -log p of the targets. */
typedef struct {
  int64_t N, V, H;
  int32_t target; /* index into ls_target_name's list; -1: the active one */
  int32_t num_threads;
  const float* h;         /* N x H */
  const float* weight;    /* V x H */
  const float* bias;      /* V */
  const int64_t* targets; /* N, below V; below 0: nothing to predict */
  double* nats;           /* N: -log p of each target, 0 where there is none */
  float* dh;              /* N x H: gradients of the loss, of rows without a target 0 */
  float* dweight;         /* V x H */
  float* dbias;           /* V */
  float scale;
  int32_t reserved; /* 0 */
} ls_loss_args;

/* The weights of one layer in one direction, and how wide it is: as in ls_shape and ls_forward_args. */
typedef struct {
  int64_t I, H, P;
  int32_t cell;
  int32_t reserved; /* 0 */
  const float *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
} ls_weights;

/* LS_ABI_VERSION of the library. */
LS_API int32_t ls_abi_version(void);

/* Targets: builds of the same kernels for different processors. Number of them; name of each ("avx512", "avx2", ...), best
   first; whether this processor has it; the one that runs where a shape says -1; and its choice (LS_BAD_ARGUMENT where the
   processor lacks it). Choosing is for the whole process. */
LS_API int32_t ls_num_targets(void);
LS_API const char* ls_target_name(int32_t target);
LS_API int32_t ls_target_supported(int32_t target);
LS_API int32_t ls_active_target(void);
LS_API int32_t ls_set_target(int32_t target);

/* Threads: 0, the library's own pool; 1, the OpenMP pool that is in the process already (LS_BAD_ARGUMENT: there is none).
   ls_threading says which is in use. */
LS_API int32_t ls_set_threading(int32_t openmp);
LS_API int32_t ls_threading(void);

/* Seconds that a line of the cache takes from one of two threads to the other: some 3e-8 where their cores share a cache,
   several times that where they do not. Quickest of some rounds; 0: no second thread came. */
LS_API double ls_handover(void);

/* Floats that the forward pass saves for the backward pass, without or with layer normalisation; that ls_pack writes.
   -1: a bad argument. */
LS_API int64_t ls_saved_floats(const ls_shape* shape, int32_t layer_norm);
LS_API int64_t ls_packed_floats(int32_t cell, int64_t I, int64_t H, int64_t P, int32_t target);

/* Lay out weights as the forward pass reads them: of use where the same weights serve many calls. `packed` is valid for the
   target it was made for; 64-byte alignment is faster. */
LS_API int32_t ls_pack(const ls_weights* weights, int32_t target, float* packed);

/* The same for what ls_decode reads. `rows`: (V + 1) x G H, the product of each symbol's input with W_ih and the biases (of the
   GRU's n only b_ih; b_hh belongs to ls_pack's). `weight`: V x H, `bias`: V. Floats that they write; -1: a bad argument. */
LS_API int64_t ls_table_floats(int32_t cell, int64_t V, int64_t H, int32_t target);
LS_API int64_t ls_head_floats(int64_t V, int64_t H, int32_t target);
LS_API int32_t ls_pack_table(int32_t cell, int64_t V, int64_t H, int32_t target, const float* rows, float* table);
LS_API int32_t ls_pack_head(int64_t V, int64_t H, int32_t target, const float* weight, const float* bias, float* head);

/* Packed weights as ls_read, ls_read_tree and ls_decode also take them: eight bits each and a scale a column. Of a layer that
   ls_pack has packed, or with -1 as the cell of a head that ls_pack_head has; at most 131,072 wide, so that sums have 32 bits.
   Floats that they take; -1: a bad argument. */
LS_API int64_t ls_rounded_floats(int32_t cell, int64_t I_or_V, int64_t H, int32_t target);
LS_API int32_t ls_round(int32_t cell, int64_t I_or_V, int64_t H, int32_t target, const float* packed, float* rounded);

/* A number that changes when the weights do, if most of them do: from 64 values of each matrix and 8 of each bias.
   For who keeps packed weights and cannot be told of changes. 0: a bad argument. */
LS_API uint64_t ls_sample(const ls_weights* weights);

/* One direction of a layer, or the two of it: `count` of args, 1 or 2, whose shapes differ in `reverse` alone and which both are
   packed or not, and save or not. Two run side by side, in half of the threads each, where that is faster. */
LS_API int32_t ls_forward(const ls_forward_args* args, int32_t count);
/* The same back. Two may have one dx, if the second has accumulate_dx. The order in which gradients are summed over rows may depend
   on num_threads and on count, but not on how many threads then came. */
LS_API int32_t ls_backward(const ls_backward_args* args, int32_t count);

/* What a forward call saved, laid out to be looked at: of an LSTM its gates after their activations and c after the step, of a
   GRU r, z, n, each T x B x H in the order of the batch, 0 where a row has no step. Of an RNN nothing: y has it all.
   `shape` and `layer_norm` as in that call. */
LS_API int32_t ls_gates(const ls_shape* shape, int32_t layer_norm, const float* saved, float* gates);

/* Write texts: choose a symbol from the logits, read it, and so on. A text is the same alone and in any batch, in one call
   and in several, with any number of threads, as long as the target stays the same. */
LS_API int32_t ls_decode(const ls_decode_args* args);

/* Read texts, and say how well the model predicts them. nats: within 1e-6 of the exact figure, but for the rounding of the
   logits. The same bits for a text alone and in any batch, in one call and in several, with any number of threads. */
LS_API int32_t ls_read(const ls_read_args* args);

/* The same of texts that begin alike: nats of a node have the bits that ls_read gives them in a text of its own. */
LS_API int32_t ls_read_tree(const ls_tree_args* args);

/* An output layer, its loss and all gradients in one. nats: within 1e-6 of the exact figure, but for the rounding of the logits.
   The same bits with any number of threads. */
LS_API int32_t ls_loss(const ls_loss_args* args);

/* y[i] = f(x[i]) as the kernels compute it, for tests: 0 exp, 1 tanh, 2 sigmoid; of x at most 0 the exp in double that a symbol
   is chosen by: 3 as a float, 4 what that leaves. y may be x. */
LS_API int32_t ls_apply(int32_t function, int32_t target, int64_t n, const float* x, float* y);

/* Ask the system for large pages for memory of several megabytes that has not been written yet: weights that are packed, what
   a forward pass saves, gradients. Does nothing where that cannot be had. */
LS_API void ls_prefer_large_pages(void* memory, int64_t bytes);

/* Free the scratch memory that no call is using. */
LS_API void ls_trim(void);

#ifdef __cplusplus
}
#endif

#endif
