// What this machine can do at most, for the shares that cpu_vs_peers.py reports; prints one JSON line.
//
//   ceilings THREADS MEGABYTES_PER_THREAD SAMPLES
//
// read   every thread streams four buffers at once, far larger than the caches: what decoding can reach at best
// fma    fp32 multiply-adds that touch registers only: what prefill in fp32 can reach at best
//
// GCC's vector types make one source serve all instruction sets: VECTOR_BYTES and -m flags choose.

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

namespace {

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef long long Ints __attribute__((vector_size(VECTOR_BYTES)));

constexpr int kStreams = 4;
constexpr int kUnroll = 4;
// Twelve independent chains hide a latency of up to six cycles on two units, and fit into 16 registers.
constexpr int kChains = 12;
constexpr int kFmaRounds = 1 << 20;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One thread per allowed core: two threads that share a core for a while would lower the ceiling.
void pin(int index) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int wanted = index % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || wanted-- != 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
}

// Seconds from the first thread's start to the last one's end, once per sample.
std::vector<double> run(int threads, int samples, const std::function<void(int)>& work) {
  std::vector<double> seconds(samples), starts(threads), ends(threads);
  std::atomic<int> arrived{0};
  auto meet = [&](int round) {
    arrived.fetch_add(1);
    while (arrived.load() < threads * round) std::this_thread::yield();
  };
  auto body = [&](int index) {
    pin(index);
    work(index);  // not timed: first touch, clock ramp
    int round = 0;
    for (int sample = 0; sample < samples; ++sample) {
      meet(++round);
      starts[index] = now();
      work(index);
      ends[index] = now();
      meet(++round);
      if (index == 0) {
        seconds[sample] = *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
      }
      meet(++round);
    }
  };
  std::vector<std::thread> others;
  for (int index = 0; index < threads; ++index) others.emplace_back(body, index);
  for (auto& other : others) other.join();
  return seconds;
}

// Sums keep the loads alive; `stream_vectors` is a multiple of kUnroll.
Ints read_streams(const Ints* data, size_t stream_vectors) {
  Ints sums[kStreams][kUnroll] = {};
  for (size_t at = 0; at < stream_vectors; at += kUnroll) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const Ints* from = data + stream * stream_vectors + at;
      for (int k = 0; k < kUnroll; ++k) sums[stream][k] ^= from[k];
    }
  }
  Ints total = {};
  for (auto& stream : sums)
    for (auto& sum : stream) total ^= sum;
  return total;
}

Floats multiply_add(float factor, float term) {
  Floats chains[kChains], factors = {}, terms = {};
  factors += factor;
  terms += term;
  for (int chain = 0; chain < kChains; ++chain) chains[chain] = terms * static_cast<float>(chain);
  for (int round = 0; round < kFmaRounds; ++round)
    for (auto& chain : chains) chain = chain * factors + terms;
  Floats total = {};
  for (auto& chain : chains) total += chain;
  return total;
}

void print(const char* name, std::vector<double> seconds, double amount, const char* end) {
  std::sort(seconds.begin(), seconds.end());
  std::printf("\"%s_median\": %.3f, \"%s_max\": %.3f%s", name, amount / seconds[seconds.size() / 2] / 1e9, name,
              amount / seconds.front() / 1e9, end);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: ceilings THREADS MEGABYTES_PER_THREAD SAMPLES\n");
    return 2;
  }
  const int threads = std::max(1, std::atoi(argv[1])), samples = std::max(1, std::atoi(argv[3]));
  const size_t unit = sizeof(Ints) * kStreams * kUnroll;
  const size_t bytes = static_cast<size_t>(std::max(1, std::atoi(argv[2]))) * 1000000 / unit * unit;
  std::vector<Ints*> buffers(threads);
  for (auto& buffer : buffers) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
      std::perror("ceilings: mmap");
      return 1;
    }
    madvise(pages, bytes, MADV_HUGEPAGE);  // fewer page walks: the ceiling is what memory gives, not the TLB
    std::memset(pages, 1, bytes);          // untouched pages would all be the one zero page
    buffer = static_cast<Ints*>(pages);
  }
  // What is computed must be stored where the compiler cannot see that nobody reads it.
  [[maybe_unused]] static volatile long long sink;
  const auto read = run(threads, samples, [&](int index) {
    sink = read_streams(buffers[index], bytes / sizeof(Ints) / kStreams)[0];
  });
  const float factor = 1.0f - 1e-3f * argc, term = 1e-3f * argc;  // unknown at compile time; the chains stay finite
  const auto fma = run(threads, samples, [&](int) { sink = static_cast<long long>(multiply_add(factor, term)[0]); });
  const double flops = 2.0 * kChains * kFmaRounds * (sizeof(Floats) / sizeof(float)) * threads;
  std::printf("{\"vector_bytes\": %d, \"threads\": %d, ", VECTOR_BYTES, threads);
  print("read_gb_per_second", read, static_cast<double>(bytes) * threads, ", ");
  print("fma_gflop_per_second", fma, flops, "}\n");
  return 0;
}
