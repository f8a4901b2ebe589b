// The C interface of the kernels: a pool of threads, and one entry for all ops. What it speaks of is in kernels.h.

#include <new>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

const Kernels* pick_kernels(const char* wanted) {
  const Kernels* candidates[] = {mi_kernels_avx512(), mi_kernels_avx2(), mi_kernels_neon(), mi_kernels_generic()};
  for (const Kernels* kernels : candidates) {
    if (kernels && (!*wanted || !__builtin_strcmp(wanted, kernels->name))) return kernels;
  }
  return nullptr;
}

}  // namespace

struct BoundOp {
  Pool* pool;
  int (*run)(Pool*, const void* args);
};

struct KernelPool {
  const Kernels* kernels;
  Pool* pool;
  BoundOp ops[kNumOps];
};

extern "C" {

// Of kernels.h, as setup.py reads it.
uint32_t mi_header_crc32() { return MI_HEADER_CRC32; }

// threads >= 1; variant: "avx512", "avx2", "neon", "generic" or "" for the best one. Null on failure or when this CPU
// lacks it.
KernelPool* mi_pool_create(int threads, const char* variant) {
  const Kernels* kernels = pick_kernels(variant);
  Pool* pool = kernels && threads >= 1 ? pool_create(threads) : nullptr;
  KernelPool* handle = pool ? new (std::nothrow) KernelPool{kernels, pool, {}} : nullptr;
  for (int i = 0; handle && i < kNumOps; ++i) handle->ops[i] = {pool, kernels->ops[i].run};
  return handle;
}

void mi_pool_destroy(KernelPool* handle) {
  pool_destroy(handle->pool);
  delete handle;
}

const char* mi_pool_variant(const KernelPool* handle) { return handle->kernels->name; }

// Valid as long as the pool. Null when there is no op of this name whose arguments take so many bytes.
const BoundOp* mi_find_op(const KernelPool* handle, const char* name, size_t args_bytes) {
  for (int i = 0; i < kNumOps; ++i) {
    const OpEntry& entry = handle->kernels->ops[i];
    if (!__builtin_strcmp(name, entry.name) && args_bytes == entry.args_bytes) return &handle->ops[i];
  }
  return nullptr;
}

// Returns the op's Status.
int mi_run(const BoundOp* op, const void* args) { return pool_take_turn(op->pool, op->run, args); }

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

}  // extern "C"
