// Threads that spin briefly for the next op and then sleep. With one thread there are no threads at all.
//
// The tasks of an op are divided into contiguous ranges, one for each thread: weights are read fastest as a few long
// streams. Who is done with a range goes on with what is left of the others. A single 64-bit ticket holds (epoch, number
// of ranges, next range), so that taking a range and checking that it is still to be had is one atomic addition: a thread
// that slept through an op can neither miss one nor repeat one, and the caller waits for ranges to be finished, never for
// threads to wake up.

#include "pool.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"

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
  const Kernels* kernels = nullptr;
  pid_t owner = 0;
  std::vector<std::thread> workers;
  std::vector<Scratch> scratch;
  std::vector<Range> ranges;

  std::mutex one_op;  // ops of several Python threads take turns
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

namespace {

// Serialises ops; in a forked child there is nobody to serialise with, and the mutex may be left locked.
class Turn {
 public:
  explicit Turn(Pool* pool) : pool_(pool->owner == getpid() ? pool : nullptr) {
    if (pool_) pool_->one_op.lock();
  }
  ~Turn() {
    if (pool_) pool_->one_op.unlock();
  }

 private:
  Pool* pool_;
};

const Kernels* pick_kernels(const char* wanted) {
  const Kernels* candidates[] = {mi_kernels_avx512(), mi_kernels_avx2(), mi_kernels_neon(), mi_kernels_generic()};
  for (const Kernels* kernels : candidates) {
    if (kernels && (!*wanted || !__builtin_strcmp(wanted, kernels->name))) return kernels;
  }
  return nullptr;
}

}  // namespace

extern "C" {

int mi_abi() { return kAbi; }

// threads >= 1; variant: "avx512", "avx2", "neon", "generic" or "" for the best one. Null on failure or when this CPU
// lacks it.
Pool* mi_pool_create(int threads, const char* variant) {
  const Kernels* kernels = pick_kernels(variant);
  if (!kernels || threads < 1) return nullptr;
  Pool* pool = new (std::nothrow) Pool;
  if (!pool) return nullptr;
  try {
    pool->threads = threads;
    pool->kernels = kernels;
    pool->owner = getpid();
    pool->scratch.resize(threads + 2);
    pool->ranges = std::vector<Range>(threads);
    for (int slot = 1; slot < threads; ++slot) pool->workers.emplace_back(&Pool::loop, pool, slot);
  } catch (...) {
    pool->threads = static_cast<int>(pool->workers.size()) + 1;
  }
  return pool;
}

void mi_pool_destroy(Pool* pool) {
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

// Asks for huge pages where they fit: weights are streamed, and every small page costs an address translation.
void mi_advise_huge_pages(void* data, size_t num_bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)num_bytes;
#endif
}

const char* mi_pool_variant(const Pool* pool) { return pool->kernels->name; }

int mi_linear(Pool* pool, float* y_TN, const float* x_TK, const void* weight, const float* bias_N, int64_t T,
              const LinearShape* shape) {
  Turn turn(pool);
  return pool->kernels->linear(pool, y_TN, x_TK, weight, bias_N, T, shape);
}

int mi_pack_rows(Pool* pool, void* weight, const void* rows_NK, int64_t row_stride, int dtype, int64_t row_start,
                 int64_t num_rows, const LinearShape* shape) {
  Turn turn(pool);
  return pool->kernels->pack_rows(pool, weight, rows_NK, row_stride, dtype, row_start, num_rows, shape);
}

int mi_pack_quantized(Pool* pool, void* weight, const int8_t* q_NK, int64_t q_stride, const uint16_t* scales_NG,
                      int64_t scale_stride, int64_t row_start, int64_t num_rows, const LinearShape* shape) {
  Turn turn(pool);
  return pool->kernels->pack_quantized(pool, weight, q_NK, q_stride, scales_NG, scale_stride, row_start, num_rows,
                                       shape);
}

int mi_paged_attention(Pool* pool, float* o_TNH, const float* q_TNH, const void* k_cache, const void* v_cache,
                       const int32_t* block_tables_SB, const int32_t* query_start_S1, const int32_t* context_lens_S,
                       int64_t S, const AttentionShape* shape, float scale) {
  Turn turn(pool);
  return pool->kernels->paged_attention(pool, o_TNH, q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1,
                                        context_lens_S, S, shape, scale);
}

int mi_rms_norm(Pool* pool, float* y_TD, const float* x_TD, float* residual_TD, const float* weight_D, int64_t T,
                int64_t D, float eps) {
  Turn turn(pool);
  return pool->kernels->rms_norm(pool, y_TD, x_TD, residual_TD, weight_D, T, D, eps);
}

int mi_rope_store_kv(Pool* pool, float* q_TNH, const float* qkv_TC, const float* cos_PH, const float* sin_PH,
                     const int32_t* positions_T, const int64_t* slots_T, void* k_cache, void* v_cache, int64_t T,
                     const AttentionShape* shape) {
  Turn turn(pool);
  return pool->kernels->rope_store_kv(pool, q_TNH, qkv_TC, cos_PH, sin_PH, positions_T, slots_T, k_cache, v_cache, T,
                                      shape);
}

int mi_silu_mul(Pool* pool, float* y_TF, const float* gate_up_T2F, int64_t T, int64_t F) {
  Turn turn(pool);
  return pool->kernels->silu_mul(pool, y_TF, gate_up_T2F, T, F);
}

int mi_argmax(Pool* pool, float* values_S, int64_t* indices_S, const float* logits_SV, int64_t S, int64_t V) {
  Turn turn(pool);
  return pool->kernels->argmax(pool, values_S, indices_S, logits_SV, S, V);
}

int mi_gather_rows(Pool* pool, float* y_TD, const void* table_VD, int dtype, const void* ids_T, int ids_are_64_bit,
                   int64_t T, int64_t D) {
  Turn turn(pool);
  return pool->kernels->gather_rows(pool, y_TD, table_VD, dtype, ids_T, ids_are_64_bit, T, D);
}

int mi_attention_layer(Pool* pool, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D,
                       float eps, const LayerLinear* qkv, const LayerLinear* out, const float* cos_PH, const float* sin_PH,
                       const int32_t* positions_T, const int64_t* slots_T, void* k_cache, void* v_cache,
                       const int32_t* block_tables_SB, const int32_t* query_start_S1, const int32_t* context_lens_S,
                       int64_t T, int64_t S, const AttentionShape* shape, float scale) {
  Turn turn(pool);
  return pool->kernels->attention_layer(pool, y_TD, x_TD, residual_TD, norm_D, eps, qkv, out, cos_PH, sin_PH, positions_T,
                                        slots_T, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, T,
                                        S, shape, scale);
}

int mi_feed_forward_layer(Pool* pool, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D,
                          float eps, const LayerLinear* gate_up, const LayerLinear* down, int64_t T) {
  Turn turn(pool);
  return pool->kernels->feed_forward_layer(pool, y_TD, x_TD, residual_TD, norm_D, eps, gate_up, down, T);
}

}  // extern "C"
