/* What the files of the library share: targets, threads, scratch memory. No instruction set is assumed here. */

#ifndef LONGSHORT_INTERNAL_H
#define LONGSHORT_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "longshort.h"

namespace ls {

/* One build of kernels.cpp. Arguments have been checked when these are called. */
struct Target {
  const char* name;
  int32_t (*forward)(const ls_forward_args*, int32_t count);
  int32_t (*backward)(const ls_backward_args*, int32_t count);
  int64_t (*saved_floats)(const ls_shape*, bool layer_norm);
  void (*gates)(const ls_shape*, bool layer_norm, const float* saved, float* gates);
  int64_t (*packed_floats)(int32_t cell, int64_t I, int64_t H, int64_t P);
  void (*pack)(int32_t cell, int64_t I, int64_t H, int64_t P, const float* weight_ih, const float* weight_hh,
               const float* bias_ih, const float* bias_hh, const float* weight_hr, float* packed);
  int32_t (*decode)(const ls_decode_args*);
  int32_t (*read)(const ls_read_args*);
  int32_t (*read_tree)(const ls_tree_args*);
  int64_t (*table_floats)(int32_t cell, int64_t symbols, int64_t H);
  int64_t (*head_floats)(int64_t V, int64_t H);
  void (*pack_table)(int32_t cell, int64_t symbols, int64_t H, const float* rows, float* table);
  int64_t (*rounded_floats)(int32_t cell, int64_t I_or_V, int64_t H);
  void (*round)(int32_t cell, int64_t I_or_V, int64_t H, const float* packed, float* rounded);
  void (*pack_head)(int64_t V, int64_t H, const float* weight, const float* bias, float* head);
  int32_t (*loss)(const ls_loss_args*);
  void (*apply)(int32_t function, int64_t n, const float* x, float* y);
};

/* library.cpp */

/* Most products of bytes in a sum of 32 bits. */
constexpr int64_t kDeepestBytes = 1 << 17;

/* Whether the processor multiplies vectors of bytes, four products in each sum (AVX512-VNNI). */
bool multiplies_bytes();

/* Whether a core reads from the third-level cache about as fast as it multiplies a few rows with what comes: AMD's, by their maker. */
bool third_level_is_near();

/* threads.cpp */

constexpr int kMostThreads = 256;

/* Runs body(context, thread, count) in `num_threads` threads, or in fewer where so many cannot be had or somebody else has the
   other cores: `count` says. `of` is how many there might have been; OpenMP's are kept alive, so many that other regions use. */
void parallel(int num_threads, int of, void (*body)(void* context, int thread, int count), void* context);

/* How many threads a call of `flops` operations in `steps` steps that wait for each other should use, at most `wanted`. It
   depends on nothing else: sums that are made in so many parts have the same bits in every call. */
int useful_threads(int wanted, double flops, double steps);

/* The rows that a product of `rows` in `steps` steps takes as long as: one of fewer than kRowsOfAStep at a time waits for its
   weights, which come from the core's second-level cache, as long as one of so many. */
constexpr int64_t kRowsOfAStep = 6;
inline double rows_waited_for(int64_t rows, int64_t steps) {
  return double(rows > kRowsOfAStep * steps ? rows : kRowsOfAStep * steps);
}

/* Operations that could be made while a weight comes, once a call, from wherever the threads of an update have left it. */
constexpr double kFlopsPerUpdatedWeight = 32.0;

bool set_threading(bool openmp);
bool uses_openmp();
double handover();

/* A team of threads that divides work and waits for each other between steps. Where there are two in the whole call, and one
   waits for long again and again, since the other is not being run (a neighbour has its core), the first goes on alone and the
   other leaves. */
class Team {
 public:
  /* Of the whole team. */
  struct Shared {
    alignas(64) int arrived;
    alignas(64) int phase;
    alignas(64) int slow; /* somebody has waited too long */
    int alone;            /* the last to arrive decides that the first goes on alone */
  };

  /* all: threads of the call, if more than the team's. */
  Team(Shared* shared, int index, int count, int all = 0);

  /* Waits until all have come here. False: this thread has nothing more to do. */
  bool wait();

  int index() const { return index_; }
  int count() const { return count_; }

  /* Whether this is the first thread, which stays where the others leave. */
  bool leads() const { return index_ == 0; }

  /* Runs body(team, number) for each of `teams` that this thread is in, all of them begun anew: the threads that there are divide
     into them; where fewer came than there are teams, or the others have left, one thread is several teams. */
  template <class Body>
  void for_teams(Shared* shared, int teams, Body body) const {
    if (count_ < teams) {
      for (int64_t number = begin(teams); number < end(teams); ++number) {
        Team alone(shared + number, 0, 1);
        body(alone, number);
      }
      return;
    }
    const int number = ((index_ + 1) * teams - 1) / count_, first = count_ * number / teams;
    Team team(shared + number, index_ - first, count_ * (number + 1) / teams - first, count_);
    body(team, number);
  }

  /* This thread's share of n pieces. */
  int64_t begin(int64_t n) const { return n * index_ / count_; }
  int64_t end(int64_t n) const { return n * (index_ + 1) / count_; }

 private:
  bool is_much(int64_t long_waits, int64_t at) const;

  Shared* shared_;
  int index_, count_, all_, phase_;
  int64_t begun_, last_;
  int64_t waited_ = 0, long_waits_ = 0; /* ns */
};

/* sampling.cpp */

/* The symbol that `sampling` chooses, `step` symbols after its position: `best` has the largest of V logits, scratch[i] is
   e^((logits[i] - logits[best]) / temperature). Of scratch there are choice_bytes(V), overwritten. */
int64_t choose_by_weight(const float* logits, int64_t best, int64_t V, const ls_sampling& sampling, int64_t step, double* scratch);
size_t choice_bytes(int64_t V);
double logarithm(double x);

/* memory.cpp */

/* Scratch memory for one call, 64-byte aligned; NULL where there is none. Blocks are kept and reused. */
void* take(size_t bytes);
void give(void* block);
void trim();

/* Asks the system for large pages where the memory is large; of use before it is first written. */
void prefer_large_pages(void* memory, size_t bytes);

}  // namespace ls

#endif
