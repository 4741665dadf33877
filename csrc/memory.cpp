/* Scratch memory that is kept between calls: fresh pages cost more than the arithmetic on them. */

#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "internal.h"

namespace ls {
namespace {

constexpr size_t kAlignment = 64, kHugePage = size_t(2) << 20;
constexpr int kKept = 8;                         /* blocks that wait for the next call */
constexpr size_t kKeptBytes = size_t(256) << 20; /* all of them together */

struct Header {
  size_t bytes;   /* after the header */
  uint64_t given; /* when it was given back: how many were before */
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
Header* kept[kKept];
size_t kept_bytes = 0;
uint64_t times_given = 0;

Header* header_of(void* block) { return reinterpret_cast<Header*>(static_cast<char*>(block) - kAlignment); }
void* block_of(Header* header) { return reinterpret_cast<char*>(header) + kAlignment; }

void before_fork() { pthread_mutex_lock(&lock); }
void after_fork() { pthread_mutex_unlock(&lock); }
__attribute__((constructor)) void register_fork() { pthread_atfork(before_fork, after_fork, after_fork); }

}  // namespace

void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (bytes >= 2 * kHugePage && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void* take(size_t bytes) {
  /* The smallest kept block that is large enough, and not more than twice too large. */
  pthread_mutex_lock(&lock);
  int best = -1;
  for (int i = 0; i < kKept; ++i)
    if (kept[i] && kept[i]->bytes >= bytes && kept[i]->bytes / 2 <= bytes + kHugePage &&
        (best < 0 || kept[i]->bytes < kept[best]->bytes))
      best = i;
  Header* header = nullptr;
  if (best >= 0) {
    header = kept[best];
    kept[best] = nullptr;
    kept_bytes -= header->bytes;
  }
  pthread_mutex_unlock(&lock);
  if (header) return block_of(header);

  size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
  size_t all = bytes + kAlignment;
  if (all < bytes) return nullptr;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, all)) return nullptr;
  prefer_large_pages(memory, all);
  header = static_cast<Header*>(memory);
  header->bytes = bytes;
  return block_of(header);
}

void give(void* block) {
  if (!block) return;
  Header* header = header_of(block);
  if (header->bytes > kKeptBytes) return free(header);
  /* What has waited longest makes room: it may be of a shape that nobody has any more. */
  Header* dropped[kKept];
  int num_dropped = 0, place = -1;
  pthread_mutex_lock(&lock);
  header->given = times_given++;
  while (place < 0) {
    int free_place = -1, oldest = -1;
    for (int i = 0; i < kKept; ++i) {
      if (!kept[i])
        free_place = i;
      else if (oldest < 0 || kept[i]->given < kept[oldest]->given)
        oldest = i;
    }
    if (free_place >= 0 && kept_bytes + header->bytes <= kKeptBytes) {
      place = free_place;
    } else {
      dropped[num_dropped++] = kept[oldest];
      kept_bytes -= kept[oldest]->bytes;
      kept[oldest] = nullptr;
    }
  }
  kept[place] = header;
  kept_bytes += header->bytes;
  pthread_mutex_unlock(&lock);
  for (int i = 0; i < num_dropped; ++i) free(dropped[i]);
}

void trim() {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < kKept; ++i) {
    free(kept[i]);
    kept[i] = nullptr;
  }
  kept_bytes = 0;
  pthread_mutex_unlock(&lock);
}

}  // namespace ls
