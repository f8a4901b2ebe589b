// The thread pool and scratch memory that every op of this library runs on, behind an opaque handle.
//
// Deliberately free of standard C++ headers: the variant_*.cpp files include it and are compiled for newer CPUs, and an
// inline function they shared with the baseline files could be linked in with instructions the machine lacks.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct Pool;

// threads >= 1, the caller counted. Null when there is no memory.
Pool* pool_create(int threads);
void pool_destroy(Pool* pool);

// op(pool, args) when its turn has come: ops of several Python threads run one after another.
int pool_take_turn(Pool* pool, int (*op)(Pool*, const void*), const void* args);

// task in [0, num_tasks); slot in [0, threads) tells the running thread apart, for pool_scratch.
typedef void (*PoolTask)(void* context, int task, int slot);

// Runs all tasks and returns when they are done. Tasks may run in any order on any thread, so a result must not depend
// on which. The caller takes part. Must not be called from inside a task.
void pool_run(Pool* pool, int num_tasks, PoolTask function, void* context);

int pool_threads(const Pool* pool);

// 64-byte aligned memory that keeps its contents until the next request for the same slot. Slots `threads` and
// `threads + 1` are shared by all threads and may be requested only outside of tasks: the first by single ops, the
// second by what is made of several. Null when there is no memory left.
void* pool_scratch(Pool* pool, int slot, size_t num_bytes);
