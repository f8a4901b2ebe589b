// Collectives between the processes of one host over a shared file mapping: all_reduce (fp32), all_gather, broadcast.
//
// Contract
//   all_reduce  every element is the sum over ranks in one binary tree, ((r0+r1)+(r2+r3))+((r4+r5)+(r6+r7)); neighbours
//               are paired and an odd last one is carried up. The message size and the path taken never change a bit.
//   progress    each rank publishes a sequence number. Data goes through a window of two buffers per rank: a rank
//               refills a buffer only after every rank has entered the following operation, so one barrier per chunk is
//               enough.
//   waiting     pause, then sched_yield, then a futex. Every entry point returns MI_COLL_AGAIN after about 100 ms
//               without progress (or at a signal) and continues where it stopped when it is called again with the same
//               arguments.
//   death       every rank holds a POSIX lock on byte `rank` of the file. The kernel drops it when the process dies,
//               zombies included, and a forked child does not inherit it. A rank that waits looks at its peers' locks.
// Not thread-safe: one thread per context, except mi_coll_poll, mi_coll_fail and mi_coll_failure.

#if defined(__linux__)

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "peers.h"

using namespace collectives;

namespace {

enum Kind : uint64_t { ALL_REDUCE = 1, ALL_GATHER = 2, BROADCAST = 3 };

// Below this many redundant bytes, every rank summing the whole chunk is cheaper than a second barrier.
constexpr int64_t SLICED_FROM_BYTES = 64 * 1024;

uint64_t call_tag(Kind kind, int64_t bytes) { return (uint64_t(kind) << 56) | uint64_t(bytes); }

void describe(uint64_t call, char* text, size_t capacity) {
    static const char* const names[] = {"nothing", "all_reduce", "all_gather", "broadcast_ints"};
    snprintf(text, capacity, "%s of %llu bytes", names[(call >> 56) & 3],
             static_cast<unsigned long long>(call & ((uint64_t(1) << 56) - 1)));
}

int check_same_call(Context* c, int q, uint64_t call) {
    const uint64_t other = c->state(q).call[c->buffer].load(std::memory_order_relaxed);
    if (other == call) return MI_COLL_OK;
    char mine[96], theirs[96], text[320];
    describe(call, mine, sizeof mine);
    describe(other, theirs, sizeof theirs);
    snprintf(text, sizeof text, "the ranks disagree: rank %d called %s while rank %d called %s", c->rank, mine, q,
             theirs);
    return record_failure(c, q, text);
}

int check_same_calls(Context* c, uint64_t call) {
    for (int q = 0; q < c->size; q++) {
        if (q == c->rank) continue;
        const int rc = check_same_call(c, q, call);
        if (rc != MI_COLL_OK) return rc;
    }
    return MI_COLL_OK;
}

void finish_chunk(Context* c, uint32_t published, int64_t bytes) {
    c->sequence += published;
    c->buffer ^= 1;
    c->phase = 0;
    c->offset += bytes;
}

template <int R>
void sum_tree(const float* const* parts, float* out, int64_t n) {
    const float* p[R];
    for (int r = 0; r < R; r++) p[r] = parts[r];
    // `out` may be one of the parts: each element is read by all sums before it is written, so lanes stay independent.
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
        if constexpr (R == 2) {
            out[i] = p[0][i] + p[1][i];
        } else if constexpr (R == 4) {
            out[i] = (p[0][i] + p[1][i]) + (p[2][i] + p[3][i]);
        } else {
            out[i] = ((p[0][i] + p[1][i]) + (p[2][i] + p[3][i])) + ((p[4][i] + p[5][i]) + (p[6][i] + p[7][i]));
        }
    }
}

void sum_any(const float* const* parts, int size, float* out, int64_t n) {
    if (size == 2) return sum_tree<2>(parts, out, n);
    if (size == 4) return sum_tree<4>(parts, out, n);
    if (size == 8) return sum_tree<8>(parts, out, n);
    float level[MAX_RANKS] = {};
    for (int64_t i = 0; i < n; i++) {
        for (int r = 0; r < size; r++) level[r] = parts[r][i];
        for (int count = size; count > 1; count = (count + 1) / 2) {
            for (int r = 0; 2 * r < count; r++) {
                level[r] = 2 * r + 1 < count ? level[2 * r] + level[2 * r + 1] : level[2 * r];
            }
        }
        out[i] = level[0];
    }
}

// Elements of slice q of a chunk: multiples of 32 so that two ranks never write one cache line.
int64_t slice_begin(int64_t n, int q, int size) { return q == size ? n : n / 32 * q / size * 32; }

void sum_slice(Context* c, float* whole_out, const float* own, int64_t begin, int64_t end) {
    const float* parts[MAX_RANKS];
    for (int q = 0; q < c->size; q++) {
        parts[q] = (q == c->rank ? own : reinterpret_cast<const float*>(c->window(q, c->buffer))) + begin;
    }
    sum_any(parts, c->size, whole_out + begin, end - begin);
}

}  // namespace

extern "C" {

// Sums data[0..n) over the ranks, in place.
int mi_coll_all_reduce(void* context, float* data, int64_t n) {
    Context* c = static_cast<Context*>(context);
    if (c->header->failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
    const int64_t total_bytes = n * int64_t(sizeof(float));
    const uint64_t call = call_tag(ALL_REDUCE, total_bytes);
    int rc;
    while (c->offset < total_bytes) {
        const int64_t bytes = std::min(c->window_bytes, total_bytes - c->offset);
        const int64_t count = bytes / int64_t(sizeof(float));
        float* chunk = data + c->offset / int64_t(sizeof(float));
        float* own = reinterpret_cast<float*>(c->window(c->rank, c->buffer));
        const bool sliced = (c->size - 2) * bytes > SLICED_FROM_BYTES;
        if (c->phase == 0) {
            if ((rc = wait_all(c, c->sequence - 1)) != MI_COLL_OK) return rc;
            memcpy(own, chunk, size_t(bytes));
            c->state(c->rank).call[c->buffer].store(call, std::memory_order_relaxed);
            publish(c, c->sequence);
            c->phase = 1;
        }
        if (c->phase == 1) {
            if ((rc = wait_all(c, c->sequence)) != MI_COLL_OK) return rc;
            if ((rc = check_same_calls(c, call)) != MI_COLL_OK) return rc;
            if (!sliced) {
                sum_slice(c, chunk, chunk, 0, count);
                finish_chunk(c, 1, bytes);
                continue;
            }
            // In place: no other rank reads this slice of this rank's window before the next barrier.
            sum_slice(c, own, own, slice_begin(count, c->rank, c->size), slice_begin(count, c->rank + 1, c->size));
            publish(c, c->sequence + 1);
            c->phase = 2;
        }
        if ((rc = wait_all(c, c->sequence + 1)) != MI_COLL_OK) return rc;
        for (int q = 0; q < c->size; q++) {
            const int64_t begin = slice_begin(count, q, c->size), end = slice_begin(count, q + 1, c->size);
            memcpy(chunk + begin, reinterpret_cast<const float*>(c->window(q, c->buffer)) + begin,
                   size_t(end - begin) * sizeof(float));
        }
        finish_chunk(c, 2, bytes);
    }
    c->offset = 0;
    return MI_COLL_OK;
}

// out[row][q] = row `row` of rank q; every rank passes `rows` rows of `row_bytes`.
int mi_coll_all_gather(void* context, const char* local, char* out, int64_t rows, int64_t row_bytes) {
    Context* c = static_cast<Context*>(context);
    if (c->header->failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
    const int64_t total_bytes = rows * row_bytes;
    const uint64_t call = call_tag(ALL_GATHER, total_bytes);
    int rc;
    while (c->offset < total_bytes) {
        const int64_t bytes = std::min(c->window_bytes, total_bytes - c->offset);
        if (c->phase == 0) {
            if ((rc = wait_all(c, c->sequence - 1)) != MI_COLL_OK) return rc;
            memcpy(c->window(c->rank, c->buffer), local + c->offset, size_t(bytes));
            c->state(c->rank).call[c->buffer].store(call, std::memory_order_relaxed);
            publish(c, c->sequence);
            c->phase = 1;
        }
        if ((rc = wait_all(c, c->sequence)) != MI_COLL_OK) return rc;
        if ((rc = check_same_calls(c, call)) != MI_COLL_OK) return rc;
        for (int q = 0; q < c->size; q++) {
            const char* part = q == c->rank ? local + c->offset : c->window(q, c->buffer);
            for (int64_t done = 0; done < bytes;) {
                const int64_t at = c->offset + done, row = at / row_bytes, column = at % row_bytes;
                const int64_t piece = std::min(row_bytes - column, bytes - done);
                memcpy(out + (row * c->size + q) * row_bytes + column, part + done, size_t(piece));
                done += piece;
            }
        }
        finish_chunk(c, 1, bytes);
    }
    c->offset = 0;
    return MI_COLL_OK;
}

// Rank 0 sends `capacity` int64; it returns before the others have read them. The others receive up to `capacity`
// int64 and the true length in *length; MI_COLL_GROW leaves the message where it is: call again with room for *length.
int mi_coll_broadcast(void* context, int64_t* data, int64_t capacity, int64_t* length) {
    Context* c = static_cast<Context*>(context);
    if (c->header->failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
    const bool root = c->rank == 0;
    const uint64_t call = call_tag(BROADCAST, 0);
    if (root) *length = capacity;
    int rc;
    do {  // an empty array takes one round as well
        if (c->phase == 0) {
            if ((rc = wait_all(c, c->sequence - 1)) != MI_COLL_OK) return rc;
            RankState& mine = c->state(c->rank);
            if (root) {
                mine.length[c->buffer].store(capacity, std::memory_order_relaxed);
                memcpy(c->window(0, c->buffer), reinterpret_cast<char*>(data) + c->offset,
                       size_t(std::min(c->window_bytes, capacity * 8 - c->offset)));
            }
            mine.call[c->buffer].store(call, std::memory_order_relaxed);
            publish(c, c->sequence);
            c->phase = 1;
        }
        if (!root) {
            if ((rc = wait_for(c, 0, c->sequence)) != MI_COLL_OK) return rc;
            c->asleep = false;
            if ((rc = check_same_call(c, 0, call)) != MI_COLL_OK) return rc;
            if (c->offset == 0) *length = c->state(0).length[c->buffer].load(std::memory_order_relaxed);
            if (*length > capacity) return MI_COLL_GROW;
        }
        const int64_t bytes = std::min(c->window_bytes, *length * 8 - c->offset);
        if (!root) memcpy(reinterpret_cast<char*>(data) + c->offset, c->window(0, c->buffer), size_t(bytes));
        finish_chunk(c, 1, bytes);
    } while (c->offset < *length * 8);
    c->offset = 0;
    return MI_COLL_OK;
}

}  // extern "C"

#endif  // __linux__
