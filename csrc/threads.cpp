/* Threads: the OpenMP pool that is in the process (PyTorch's), or a small pool of our own; never both at work in a call. */

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include "internal.h"

namespace ls {
namespace {

constexpr int64_t kSpin = 30 * 1000;          /* ns of spinning before a waiting thread yields its core at every turn */
constexpr int64_t kLongWait = 300 * 1000;     /* ns beyond twice one's own share of a step: the other is not being run */
constexpr int64_t kFirstPause = 2 * 1000000;  /* ns of calls in fewer threads when calls have waited too much; doubled while they */
constexpr int kDoublings = 8;                 /* go on to, so many times: half a second */
constexpr int kTrouble = 8;                   /* calls that went well make up for one that did not */

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void relax() {
#if defined(__SSE2__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename T>
T get(const T* p) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
template <typename T>
void set(T* p, T value) {
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}

int most_threads = kMostThreads; /* that a call runs in, until somebody tries more */
int64_t more_at = 0;             /* when that is */
int64_t pause = kFirstPause;     /* ns until then */
int troubled = 0;                /* a thread of the present call waited for long: see Team::wait */
int troubles = 0;                /* kTrouble for each such call, 1 less for each other */

/* How many of the threads that are wanted a call gets. After a pause a third more are tried. */
int allowed(int wanted) {
  int most = get(&most_threads);
  if (most < wanted && now() >= get(&more_at)) {
    most += (most + 2) / 3;
    set(&most_threads, most);
    set(&more_at, now() + get(&pause));
  }
  return most < wanted ? most : wanted;
}

/* One call that waited may be chance; a second soon after means that somebody has a core that `threads` need. It may cost ten
   times what several threads gain, so few such calls outweigh many that went well. A quarter of the threads is left out then, of
   two one. That calls go well in `some` of the threads says nothing of all. */
void learn(int threads, bool some) {
  int count = get(&troubles);
  if (!__atomic_exchange_n(&troubled, 0, __ATOMIC_ACQ_REL)) {
    if (count && !some) set(&troubles, count - 1);
    return;
  }
  constexpr int kEnough = kTrouble * 3 / 2, kMost = kEnough + kDoublings * kTrouble;
  count = count + kTrouble < kMost ? count + kTrouble : kMost;
  set(&troubles, count);
  if (count < kEnough) return;
  set(&pause, kFirstPause << (count - kEnough) / kTrouble);
  set(&more_at, now() + get(&pause));
  set(&most_threads, threads - (threads + 3) / 4);
}

/* OpenMP: GNU's entry points, which LLVM's library has too. Found in the process, not linked against. */

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*OmpQuery)();
GompParallel gomp_parallel = nullptr;
OmpQuery omp_thread = nullptr, omp_threads = nullptr, omp_most = nullptr;
int openmp = 0;
int forked = 0; /* GNU's library cannot start threads in the child of a process that had some */

struct Region {
  void (*body)(void*, int, int);
  void* context;
  int count; /* threads that it is for, of those that come */
};

void in_region(void* region) {
  Region* r = static_cast<Region*>(region);
  const int thread = omp_thread(), come = omp_threads();
  if (thread < r->count) r->body(r->context, thread, come < r->count ? come : r->count);
}

/* Our own pool: one call at a time; a second one at the same time runs in its own thread alone. */

struct Pool {
  pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held by the call that has the pool */
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
  int size = 0;    /* workers that were started */
  int round = 0;   /* goes up with every call */
  int count = 0;   /* threads of the present call, the caller's included */
  int running = 0; /* workers that have not finished it */
  Region region = {nullptr, nullptr, 0};
};
Pool* pool = nullptr;

struct Start {
  Pool* pool;
  int index, round;
};

void* work(void* argument) {
  Start start = *static_cast<Start*>(argument);
  delete static_cast<Start*>(argument);
  Pool* p = start.pool;
  int seen = start.round;
  for (;;) {
    int64_t began = now();
    while (get(&p->round) == seen && now() - began < kSpin)
      for (int i = 0; i < 32; ++i) relax();
    pthread_mutex_lock(&p->lock);
    while (get(&p->round) == seen) pthread_cond_wait(&p->wake, &p->lock);
    seen = get(&p->round);
    int count = p->count;
    Region region = p->region;
    pthread_mutex_unlock(&p->lock);
    if (start.index < count) {
      region.body(region.context, start.index, count);
      __atomic_sub_fetch(&p->running, 1, __ATOMIC_ACQ_REL);
    }
  }
  return nullptr;
}

/* Starts workers up to `wanted` and returns how many there are. */
int grow(Pool* p, int wanted) {
  while (p->size < wanted) {
    Start* start = new Start{p, p->size + 1, p->round};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    int failed = pthread_create(&thread, &attributes, work, start);
    pthread_attr_destroy(&attributes);
    if (failed) {
      delete start;
      break;
    }
    ++p->size;
  }
  return p->size < wanted ? p->size : wanted;
}

void in_pool(int num_threads, Region region) {
  Pool* p = get(&pool);
  if (!p) {
    Pool* made = new Pool;
    if (__atomic_compare_exchange_n(&pool, &p, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      p = made;
    else
      delete made;
  }
  if (pthread_mutex_trylock(&p->in_use)) {
    region.body(region.context, 0, 1);
    return;
  }
  int count = 1 + grow(p, num_threads - 1);
  pthread_mutex_lock(&p->lock);
  p->region = region;
  p->count = count;
  set(&p->running, count - 1);
  set(&p->round, p->round + 1);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
  region.body(region.context, 0, count);
  int64_t began = now();
  while (get(&p->running)) {
    for (int i = 0; i < 32; ++i) relax();
    if (now() - began > kSpin) sched_yield();
  }
  pthread_mutex_unlock(&p->in_use);
}

void in_child() {
  pool = nullptr; /* its threads stayed with the parent */
  forked = 1;
}
__attribute__((constructor)) void register_fork() { pthread_atfork(nullptr, nullptr, in_child); }

}  // namespace

bool set_threading(bool use_openmp) {
  if (use_openmp) {
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp_thread = reinterpret_cast<OmpQuery>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp_threads = reinterpret_cast<OmpQuery>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    omp_most = reinterpret_cast<OmpQuery>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    if (!gomp_parallel || !omp_thread || !omp_threads || !omp_most) return false;
  }
  set(&openmp, int(use_openmp));
  return true;
}

bool uses_openmp() { return get(&openmp) != 0; }

void parallel(int num_threads, int of, void (*body)(void*, int, int), void* context) {
  if (num_threads > kMostThreads) num_threads = kMostThreads;
  int come = num_threads;
  if (uses_openmp() && num_threads > 1) {
    /* GNU's library ends threads that a region has no use for, and has to start them anew for the next region. */
    const int usual = omp_most();
    come = usual < of ? usual : of;
    if (come < num_threads || come > kMostThreads) come = num_threads;
  }
  const int wanted = come;
  if (wanted > 1) come = allowed(wanted);
  if (num_threads > come) num_threads = come;
  if (num_threads <= 1 || (uses_openmp() && get(&forked))) {
    body(context, 0, 1);
    return;
  }
  Region region = {body, context, num_threads};
  if (uses_openmp())
    gomp_parallel(in_region, &region, unsigned(come), 0);
  else
    in_pool(num_threads, region);
  learn(come, come < wanted);
}

namespace {

/* Two threads that hand a number on: each adds 1 where it finds its own. */
struct Handed {
  alignas(64) int number;
  alignas(64) int64_t quickest; /* ns of a round */
};

constexpr int kHands = 200, kRounds = 8;      /* of a round, an even number */
constexpr int64_t kLongRounds = 20 * 1000000; /* ns after which they end: one of the threads is not being run */

void hand_on(void* context, int thread, int count) {
  if (count < 2) return;
  Handed* handed = static_cast<Handed*>(context);
  const int64_t begun = now();
  int64_t round_begun = begun;
  for (int hand = thread; hand < kHands * kRounds; hand += 2) {
    for (int64_t looks = 1; get(&handed->number) < hand; ++looks)
      if (looks % 4096 == 0 && now() - begun > kLongRounds) set(&handed->number, kHands * kRounds);
    if (get(&handed->number) != hand) return;
    set(&handed->number, hand + 1);
    if (thread || hand % kHands) continue;
    const int64_t at = now();
    if (hand && (handed->quickest == 0 || at - round_begun < handed->quickest)) handed->quickest = at - round_begun;
    round_begun = at;
  }
}

}  // namespace

double handover() {
  Handed handed = {};
  parallel(2, 2, hand_on, &handed);
  return double(handed.quickest) / kHands * 1e-9;
}

int useful_threads(int wanted, double flops, double steps) {
  /* A thread more must save more than the waits cost that it brings: about 1 us a step and 5 a call. Where there are more than
     two, each saves less, and makes all wait longer. */
  constexpr double kFlopsPerStep = 1.5e5, kFlopsPerCall = 5e5;
  const double most = flops / (kFlopsPerStep * steps + kFlopsPerCall);
  while (wanted > 1 && most < wanted * __builtin_sqrt(0.5 * wanted)) --wanted;
  return wanted < 1 ? 1 : wanted;
}

Team::Team(Shared* shared, int index, int count, int all)
    : shared_(shared), index_(index), count_(count), all_(all > count ? all : count), phase_(0), begun_(count > 1 ? now() : 0),
      last_(begun_) {}

bool Team::wait() {
  if (count_ == 1) return true;
  Shared* s = shared_;
  int64_t arrived = now(), patience = kLongWait + 2 * (arrived - last_), waited = 0;
  if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == count_) {
    set(&s->arrived, 0);
    s->alone = get(&s->slow);
    set(&s->phase, phase_ + 1);
  } else {
    while (get(&s->phase) == phase_) {
      for (int i = 0; i < 8; ++i) relax();
      waited = now() - arrived;
      if (waited > kSpin) sched_yield();
      if (waited > patience && long_waits_ && is_much(long_waits_ + waited, arrived + waited)) set(&s->slow, 1);
    }
  }
  ++phase_;
  last_ = now();
  waited_ += waited;
  if (waited > patience) long_waits_ += waited;
  /* At least half of the call, and so much of it that two threads would have been done. */
  const int64_t elapsed = last_ - begun_;
  if (waited_ > kLongWait && 2 * waited_ > elapsed && all_ * waited_ > (all_ - 2) * elapsed) set(&troubled, 1);
  if (!s->alone) return true;
  if (index_ != 0) return false;
  count_ = 1;
  return true;
}

/* Whether a quarter of this call was spent in waits that should not have been; of more threads one alone would not be as fast. */
bool Team::is_much(int64_t long_waits, int64_t at) const { return all_ == 2 && 4 * long_waits > at - begun_; }

}  // namespace ls
