// How the ranks of one host meet, wait for each other and notice that one has failed; see collectives.cpp.

#if defined(__linux__)

#include "peers.h"

#include <cerrno>
#include <climits>
#include <cstdio>
#include <ctime>
#include <new>

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace collectives {

namespace {

constexpr int64_t TICK_NS = 100'000'000;

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

}  // namespace

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

}  // namespace collectives

using namespace collectives;

extern "C" {

int64_t mi_coll_mapping_bytes(int size, int64_t window_bytes) {
    return int64_t(sizeof(Header)) + 2 * int64_t(size) * window_bytes;
}

// Maps `fd` (zero-filled, mi_coll_mapping_bytes long) and takes this rank's lock. nullptr and errno on failure. Owns
// `fd` only on success: mi_coll_close closes it.
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
