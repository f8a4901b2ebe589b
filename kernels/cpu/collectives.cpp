// Collectives between the processes of one host over a shared file mapping: all_reduce (fp32), all_gather, broadcast.
//
// Contract
//   all_reduce   every element is the sum over ranks in one binary tree, ((r0+r1)+(r2+r3))+((r4+r5)+(r6+r7)); neighbours are
//                paired and an odd last one is carried up. The message size and the path taken never change a bit.
//   progress     each rank publishes a sequence number. Data goes through a window of two buffers per rank: a rank refills
//                a buffer only after every rank has entered the following operation, so one barrier per chunk is enough.
//   waiting      pause, then sched_yield, then a futex. Every entry point returns MI_COLL_AGAIN after about 100 ms without
//                progress (or at a signal) and continues where it stopped when it is called again with the same arguments.
//   death        every rank holds a POSIX lock on byte `rank` of the file. The kernel drops it when the process dies, zombies
//                included, and a forked child does not inherit it. A rank that waits looks at its peers' locks.
// Not thread-safe: one thread per context, except mi_coll_poll, mi_coll_fail and mi_coll_failure.

#if defined(__linux__)

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <new>

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

enum Result { MI_COLL_OK = 0, MI_COLL_AGAIN = 1, MI_COLL_FAILED = 2, MI_COLL_GROW = 3 };
enum Kind : uint64_t { ALL_REDUCE = 1, ALL_GATHER = 2, BROADCAST = 3 };

constexpr int MAX_RANKS = 64;
constexpr size_t MESSAGE_BYTES = 1024;
constexpr int64_t TICK_NS = 100'000'000;
// Below this many redundant bytes, every rank summing the whole chunk is cheaper than a second barrier.
constexpr int64_t SLICED_FROM_BYTES = 64 * 1024;

struct alignas(128) RankState {
    std::atomic<uint32_t> sequence;  // last operation this rank has published
    std::atomic<uint32_t> sleepers;  // peers in a futex wait on `sequence`
    std::atomic<uint32_t> closed;
    std::atomic<int64_t> identity;    // process identity: ranks that are threads of one process cannot see each other's lock
    std::atomic<uint64_t> call[2];    // kind and size of the operation in each buffer, to catch ranks that disagree
    std::atomic<int64_t> length[2];   // int64 count of the broadcast in each buffer
};

struct alignas(128) Header {
    std::atomic<uint32_t> failed;  // 0 no, 1 being written, 2 written
    int32_t failed_rank;
    char message[MESSAGE_BYTES];
    RankState ranks[MAX_RANKS];
};

struct Context {
    Header* header;
    char* windows;
    size_t mapped_bytes;
    int fd, rank, size;
    int64_t window_bytes;
    int64_t identity;
    uint32_t sequence = 1;  // the next one to publish; wraps, so compared by signed difference
    int buffer = 0;
    int phase = 0;        // of the chunk in progress
    int64_t offset = 0;   // bytes of the call that are finished
    bool asleep = false;  // this wait already went past spinning
    int64_t spin_ns, yield_ns;
    int late_rank = -1;
    int32_t local_failed_rank = -1;  // when the writer of the shared message died while writing it
    char local_message[MESSAGE_BYTES] = {0};

    char* window(int rank_, int buffer_) const { return windows + (2 * int64_t(rank_) + buffer_) * window_bytes; }
    RankState& state(int rank_) const { return header->ranks[rank_]; }
};

inline void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

long futex(std::atomic<uint32_t>* address, int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(address), operation, value, timeout, nullptr, 0);
}

void wake(RankState& state) { futex(&state.sequence, FUTEX_WAKE, INT_MAX, nullptr); }

inline bool reached(const RankState& state, uint32_t target) {
    return int32_t(state.sequence.load(std::memory_order_acquire) - target) >= 0;
}

void publish(Context* c, uint32_t sequence) {
    RankState& mine = c->state(c->rank);
    mine.sequence.exchange(sequence, std::memory_order_seq_cst);  // ordered before the look at `sleepers`
    if (mine.sleepers.load(std::memory_order_seq_cst) != 0) wake(mine);
}

int record_failure(Context* c, int rank, const char* message) {
    Header* h = c->header;
    if (c->local_failed_rank < 0) {
        snprintf(c->local_message, MESSAGE_BYTES, "%s", message);
        c->local_failed_rank = rank;
    }
    uint32_t none = 0;
    if (h->failed.compare_exchange_strong(none, 1)) {
        h->failed_rank = rank;
        snprintf(h->message, MESSAGE_BYTES, "%s", message);
        h->failed.store(2, std::memory_order_release);
        for (int q = 0; q < c->size; q++) wake(c->state(q));
    }
    return MI_COLL_FAILED;
}

bool is_alive(const Context* c, int q) {
    if (c->state(q).identity.load(std::memory_order_relaxed) == c->identity) return true;
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = q;
    lock.l_len = 1;
    return fcntl(c->fd, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

// A peer that closed after its last operation is not a failure as long as nothing more is expected of it.
int check_peers(Context* c, bool any_closed, uint32_t target) {
    if (c->header->failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
    for (int q = 0; q < c->size; q++) {
        if (q == c->rank) continue;
        // Order matters: a peer sets `closed` before its lock goes.
        const bool alive = is_alive(c, q);
        const bool closed = c->state(q).closed.load(std::memory_order_acquire) != 0;
        if (closed && (any_closed || !reached(c->state(q), target))) return record_failure(c, q, "it closed the group");
        if (!alive && !closed) return record_failure(c, q, "its process died");
    }
    return MI_COLL_OK;
}

int wait_for(Context* c, int q, uint32_t target) {
    RankState& peer = c->state(q);
    if (reached(peer, target)) return MI_COLL_OK;
    c->late_rank = q;
    const std::atomic<uint32_t>& failed = c->header->failed;
    if (!c->asleep) {
        const int64_t start = now_ns();
        int64_t waited = 0;
        while (waited < c->yield_ns) {
            if (waited < c->spin_ns) {
                for (int i = 0; i < 32; i++) {
                    cpu_pause();
                    if (reached(peer, target)) return MI_COLL_OK;
                }
            } else {
                sched_yield();
                if (reached(peer, target)) return MI_COLL_OK;
            }
            if (failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
            waited = now_ns() - start;
        }
    }
    c->asleep = true;
    const uint32_t seen = peer.sequence.load(std::memory_order_acquire);
    peer.sleepers.fetch_add(1, std::memory_order_seq_cst);
    long rc = -1;
    int error = EAGAIN;
    if (!reached(peer, target) && failed.load(std::memory_order_acquire) == 0) {
        const timespec tick = {0, TICK_NS};
        rc = futex(&peer.sequence, FUTEX_WAIT, seen, &tick);
        error = errno;
    }
    peer.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (reached(peer, target)) return MI_COLL_OK;
    if (failed.load(std::memory_order_acquire) != 0) return MI_COLL_FAILED;
    if (rc != 0 && error == EAGAIN) return MI_COLL_AGAIN;
    const int checked = check_peers(c, false, target);
    return reached(peer, target) ? MI_COLL_OK : checked == MI_COLL_OK ? MI_COLL_AGAIN : checked;
}

int wait_all(Context* c, uint32_t target) {
    for (int q = 0; q < c->size; q++) {
        if (q == c->rank) continue;
        const int rc = wait_for(c, q, target);
        if (rc != MI_COLL_OK) return rc;
    }
    c->asleep = false;
    return MI_COLL_OK;
}

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
    snprintf(text, sizeof text, "the ranks disagree: rank %d called %s while rank %d called %s", c->rank, mine, q, theirs);
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
            for (int r = 0; 2 * r < count; r++) level[r] = 2 * r + 1 < count ? level[2 * r] + level[2 * r + 1] : level[2 * r];
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

int64_t mi_coll_mapping_bytes(int size, int64_t window_bytes) {
    return int64_t(sizeof(Header)) + 2 * int64_t(size) * window_bytes;
}

// Maps `fd` (zero-filled, mi_coll_mapping_bytes long) and takes this rank's lock. nullptr and errno on failure. Owns `fd`
// only on success: mi_coll_close closes it.
void* mi_coll_attach(int fd, int rank, int size, int64_t window_bytes, int64_t identity) {
    if (size < 2 || size > MAX_RANKS || rank < 0 || rank >= size || window_bytes % 4096 != 0) {
        errno = EINVAL;
        return nullptr;
    }
    const size_t bytes = size_t(mi_coll_mapping_bytes(size, window_bytes));
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return nullptr;
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    Context* c = fcntl(fd, F_SETLK, &lock) == 0 ? new (std::nothrow) Context() : nullptr;
    if (c == nullptr) {
        const int error = errno;
        munmap(base, bytes);
        errno = error;
        return nullptr;
    }
    c->header = static_cast<Header*>(base);
    c->windows = static_cast<char*>(base) + sizeof(Header);
    c->mapped_bytes = bytes;
    c->fd = fd;
    c->rank = rank;
    c->size = size;
    c->window_bytes = window_bytes;
    c->identity = identity;
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    const bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
    // With fewer cores than ranks the rank that is waited for may need this very core.
    const bool crowded = known && CPU_COUNT(&allowed) < size;
    c->spin_ns = crowded ? 1'000 : 100'000;
    c->yield_ns = crowded ? 20'000 : 1'000'000;
    c->state(rank).identity.store(identity, std::memory_order_relaxed);
    return c;
}

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

void mi_coll_fail(void* context, int rank, const char* message) {
    record_failure(static_cast<Context*>(context), rank, message);
}

// The first failure of the group: its rank, or -1 when there is none. The text goes to message[0..capacity).
int mi_coll_failure(void* context, char* message, int64_t capacity) {
    const Context* c = static_cast<Context*>(context);
    const bool shared = c->header->failed.load(std::memory_order_acquire) == 2;
    snprintf(message, size_t(capacity), "%s", shared ? c->header->message : c->local_message);
    return shared ? c->header->failed_rank : c->local_failed_rank;
}

// MI_COLL_FAILED when a peer failed, died or closed; for a watcher, never waits.
int mi_coll_poll(void* context) { return check_peers(static_cast<Context*>(context), true, 0); }

// The peer that the last unfinished wait was for.
int mi_coll_late_rank(void* context) { return static_cast<Context*>(context)->late_rank; }

void mi_coll_close(void* context) {
    Context* c = static_cast<Context*>(context);
    c->state(c->rank).closed.store(1, std::memory_order_release);
    wake(c->state(c->rank));
    munmap(c->header, c->mapped_bytes);
    close(c->fd);
    delete c;
}

}  // extern "C"

#endif  // __linux__
