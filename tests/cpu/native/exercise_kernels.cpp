// Drives every kernel through the library's C interface with odd shapes and allocations of the exact size.
//
// Each result is compared with a plain loop in double precision, and bit for bit across the instruction sets of this
// CPU, thread counts and batches. Prints what the CPU has, then a line per op whose checksum must be the same on every
// machine; ends with the failing case and status 1 otherwise. Each case goes to stderr before it runs.

#include "exercise.h"

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  require(mi_header_crc32() == MI_HEADER_CRC32, "the library was built from other sources");
  require(!mi_pool_create(0, "") && !mi_pool_create(1, "sse9"), "a pool that cannot be");
  for (const char* variant : {"avx512", "avx2", "neon", "generic"}) {
    if (KernelPool* pool = mi_pool_create(1, variant)) settings.push_back({variant, pool});
  }
  printf("variants");
  for (const Setting& setting : settings) printf(" %s", setting.name.c_str());
  printf("\n");
  for (const int threads : {2, 3}) {
    settings.push_back({std::to_string(threads) + " threads", mi_pool_create(threads, "")});
  }
  require(!mi_find_op(settings[0].pool, "linear", sizeof(LinearArgs) + 8), "an op of other arguments");
  exercise_rows();
  exercise_attention();
  exercise_linear();
  for (const Setting& setting : settings) mi_pool_destroy(setting.pool);
}
