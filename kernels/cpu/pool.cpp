// Threads that spin briefly for the next op and then sleep. With one thread there are no threads at all.
//
// The tasks of an op are divided into contiguous ranges, one for each thread: weights are read fastest as a few long
// streams. Who is done with a range goes on with what is left of the others. A single 64-bit ticket holds (epoch,
// number of ranges, next range), so that taking a range and checking that it is still to be had is one atomic addition:
// a thread that slept through an op can neither miss one nor repeat one, and the caller waits for ranges to be
// finished, never for threads to wake up.

#include "pool.h"

#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int kRangeBits = 20;
constexpr uint64_t kRangeMask = (uint64_t{1} << kRangeBits) - 1;
constexpr auto kSpinTime = std::chrono::microseconds(60);

int next_range(uint64_t ticket) { return static_cast<int>(ticket & kRangeMask); }
int range_count(uint64_t ticket) { return static_cast<int>((ticket >> kRangeBits) & kRangeMask); }
bool has_range(uint64_t ticket) { return next_range(ticket) < range_count(ticket); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as condition() is, false after kSpinTime.
template <class Condition>
bool spin_until(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return condition();
}

struct alignas(64) Range {
  std::atomic<int> next{0};
  int end = 0;
};

struct Scratch {
  void* data = nullptr;
  size_t num_bytes = 0;
};

}  // namespace

struct Pool {
  int threads = 1;
  pid_t owner = 0;
  std::vector<std::thread> workers;
  std::vector<Scratch> scratch;
  std::vector<Range> ranges;

  std::mutex one_op;
  PoolTask function = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int> finished{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> closing{false};
  std::mutex sleep_mutex;
  std::condition_variable wake;

  void work(int slot) {
    while (has_range(ticket.load(std::memory_order_relaxed))) {
      const uint64_t taken = ticket.fetch_add(1, std::memory_order_acq_rel);
      if (!has_range(taken)) return;
      const int count = range_count(taken);
      for (int i = 0; i < count; ++i) {
        Range& range = ranges[(next_range(taken) + i) % count];
        for (int task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          function(context, task, slot);
        }
      }
      finished.fetch_add(1, std::memory_order_release);
    }
  }

  void loop(int slot) {
    auto wanted = [this] { return has_range(ticket.load()) || closing.load(); };
    while (!closing.load(std::memory_order_relaxed)) {
      if (!spin_until(wanted)) {
        std::unique_lock<std::mutex> lock(sleep_mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, wanted);
        sleeping.fetch_sub(1);
      }
      work(slot);
    }
  }

  void wake_all() {
    // Either this load sees the sleeper, or the sleeper, which counted itself first, sees the new ticket.
    if (sleeping.load() == 0) return;
    std::lock_guard<std::mutex> lock(sleep_mutex);
    wake.notify_all();
  }
};

Pool* pool_create(int threads) {
  Pool* pool = new (std::nothrow) Pool;
  if (!pool) return nullptr;
  try {
    pool->threads = threads;
    pool->owner = getpid();
    pool->scratch.resize(threads + 2);
    pool->ranges = std::vector<Range>(threads);
    for (int slot = 1; slot < threads; ++slot) pool->workers.emplace_back(&Pool::loop, pool, slot);
  } catch (...) {
    pool->threads = static_cast<int>(pool->workers.size()) + 1;
  }
  return pool;
}

void pool_destroy(Pool* pool) {
  if (pool->owner != getpid()) return;  // a forked child: the threads to join are the parent's
  {
    std::lock_guard<std::mutex> lock(pool->sleep_mutex);
    pool->closing.store(true);
  }
  pool->wake.notify_all();
  for (std::thread& worker : pool->workers) worker.join();
  for (Scratch& own : pool->scratch) free(own.data);
  delete pool;
}

int pool_take_turn(Pool* pool, int (*op)(Pool*, const void*), const void* args) {
  std::unique_lock<std::mutex> turn(pool->one_op, std::defer_lock);
  // A forked child has nobody to take turns with, and the mutex may be left locked.
  if (pool->owner == getpid()) turn.lock();
  return op(pool, args);
}

int pool_threads(const Pool* pool) { return pool->threads; }

void* pool_scratch(Pool* pool, int slot, size_t num_bytes) {
  Scratch& own = pool->scratch[slot];
  if (own.num_bytes < num_bytes) {
    free(own.data);
    const size_t rounded = (num_bytes + 4095) / 4096 * 4096;
    own.data = aligned_alloc(4096, rounded);
    own.num_bytes = own.data ? rounded : 0;
  }
  return own.data;
}

void pool_run(Pool* pool, int num_tasks, PoolTask function, void* context) {
  // A forked child has this object but none of its threads.
  if (num_tasks <= 1 || pool->workers.empty() || pool->owner != getpid()) {
    for (int task = 0; task < num_tasks; ++task) function(context, task, 0);
    return;
  }
  pool->function = function;
  pool->context = context;
  pool->finished.store(0, std::memory_order_relaxed);
  const int num_ranges = num_tasks < pool->threads ? num_tasks : pool->threads;
  for (int i = 0; i < num_ranges; ++i) {
    pool->ranges[i].next.store(static_cast<int>(int64_t{num_tasks} * i / num_ranges), std::memory_order_relaxed);
    pool->ranges[i].end = static_cast<int>(int64_t{num_tasks} * (i + 1) / num_ranges);
  }
  const uint64_t epoch = (pool->ticket.load(std::memory_order_relaxed) >> (2 * kRangeBits)) + 1;
  pool->ticket.store((epoch << (2 * kRangeBits)) | (static_cast<uint64_t>(num_ranges) << kRangeBits));
  pool->wake_all();
  pool->work(0);
  auto done = [pool, num_ranges] { return pool->finished.load(std::memory_order_acquire) == num_ranges; };
  while (!spin_until(done)) std::this_thread::yield();
}
