// The ranks of one host as they see each other in a shared file mapping: who has come how far, who has failed. The
// contract of the collectives is in collectives.cpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace collectives {

enum Result { MI_COLL_OK = 0, MI_COLL_AGAIN = 1, MI_COLL_FAILED = 2, MI_COLL_GROW = 3 };

constexpr int MAX_RANKS = 64;
constexpr size_t MESSAGE_BYTES = 1024;

struct alignas(128) RankState {
    std::atomic<uint32_t> sequence;  // last operation this rank has published
    std::atomic<uint32_t> sleepers;  // peers in a futex wait on `sequence`
    std::atomic<uint32_t> closed;
    std::atomic<int64_t> identity;   // of the process: ranks that are threads of one cannot see each other's lock
    std::atomic<uint64_t> call[2];   // kind and size of the operation in each buffer, to catch ranks that disagree
    std::atomic<int64_t> length[2];  // int64 count of the broadcast in each buffer
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

inline bool reached(const RankState& state, uint32_t target) {
    return int32_t(state.sequence.load(std::memory_order_acquire) - target) >= 0;
}

void publish(Context* c, uint32_t sequence);

// Each returns MI_COLL_OK, or what the entry point has to return.
int record_failure(Context* c, int rank, const char* message);
int wait_for(Context* c, int rank, uint32_t sequence);
int wait_all(Context* c, uint32_t sequence);

}  // namespace collectives
