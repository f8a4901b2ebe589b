// What the exercises share: exact allocations, repeatable numbers, the pools to compare, and the comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

struct BoundOp;
struct KernelPool;

extern "C" {
uint32_t mi_header_crc32();
KernelPool* mi_pool_create(int threads, const char* variant);
void mi_pool_destroy(KernelPool*);
const BoundOp* mi_find_op(const KernelPool*, const char* name, size_t args_bytes);
int mi_run(const BoundOp*, const void* args);
}

constexpr double kUlp = 1.0 / (1 << 24);  // the relative error of one fp32 rounding

// ---- failing ----

inline std::string current_case;

[[noreturn]] inline void fail(const std::string& what) {
  printf("FAILED %s: %s\n", current_case.c_str(), what.c_str());
  exit(1);
}

inline void require(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

template <class Args>
int run_op(KernelPool* pool, const char* name, const Args& args) {
  const BoundOp* op = mi_find_op(pool, name, sizeof(Args));
  require(op, "the library has no such op");
  return mi_run(op, &args);
}

// ---- memory ----

// Exactly n elements, filled with 0xff bytes (NaN): touching one more is an error. On the heap AddressSanitizer sees
// it; elsewhere an inaccessible page follows, which also sees the masked instructions that the sanitizer does not.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t n) : n_(n) {
    const size_t num_bytes = n * sizeof(T);
#if defined(EXACT_ON_HEAP)
    base_ = malloc(num_bytes);
    data_ = static_cast<T*>(base_);
#else
    const size_t page = sysconf(_SC_PAGESIZE), room = (num_bytes + page - 1) / page * page;
    mapped_ = room + page;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED || mprotect(static_cast<char*>(base_) + room, page, PROT_NONE)) abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(base_) + room - num_bytes);
#endif
    if (num_bytes) memset(static_cast<void*>(data_), 0xff, num_bytes);
  }
  explicit Exact(const std::vector<T>& values) : Exact(static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < n_; ++i) data_[i] = values[i];
  }
  ~Exact() {
#if defined(EXACT_ON_HEAP)
    free(base_);
#else
    munmap(base_, mapped_);
#endif
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  std::vector<T> copy() const { return std::vector<T>(data_, data_ + n_); }

 private:
  int64_t n_;
  T* data_;
  void* base_;
#if !defined(EXACT_ON_HEAP)
  size_t mapped_;
#endif
};

// ---- numbers, the same on every machine ----

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32) ^ static_cast<uint32_t>(state_ >> 55);
  }
  int64_t below(int64_t n) { return bits() % n; }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  // In [-1, 1), a multiple of 2^-23.
  float real() { return static_cast<float>(static_cast<int32_t>(bits() >> 8) - (1 << 23)) / (1 << 23); }
  template <class T>
  void fill(Exact<T>& out, float size = 1.0f) {
    for (int64_t i = 0; i < out.size(); ++i) out[i] = real() * size;
  }
  template <class T>
  const T& of(const std::vector<T>& choices) {
    return choices[below(static_cast<int64_t>(choices.size()))];
  }

 private:
  uint64_t state_;
};

// The value of element i of an array of type dtype.
inline double value_of(const void* p, int64_t i, int dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  if (dtype == kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return half >> 15 ? -size : size;
}

// To nearest even; finite values only.
inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rest = bits & 0xffff, up = rest > 0x8000 || (rest == 0x8000 && (bits >> 16 & 1));
  return static_cast<uint16_t>((bits >> 16) + up);
}

inline int64_t element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// n random elements of type dtype, finite.
inline void fill_typed(Random& random, Exact<uint8_t>& out, int dtype, float size = 1.0f) {
  for (int64_t i = 0; i < out.size() / element_bytes(dtype); ++i) {
    const float x = random.real() * size;
    uint16_t half = bf16_bits(x);
    if (dtype == kFloat16) half = static_cast<uint16_t>(random.bits()) & 0xbfff;  // below 2, subnormals too
    if (dtype == kFloat32) memcpy(out.data() + 4 * i, &x, 4);
    else memcpy(out.data() + 2 * i, &half, 2);
  }
}

// ---- the pools ----

struct Setting {
  std::string name;
  KernelPool* pool;
};

inline std::vector<Setting> settings;  // every variant of this CPU on one thread, then the best one on two and three

// ---- comparing ----

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return x == x ? bits : 0x7fc00000;  // which NaN it is differs between instruction sets and means nothing
}
template <class T>
uint64_t bits_of(T x) {
  return static_cast<uint64_t>(x);
}

template <class T>
void require_same(const T* actual, const T* expected, int64_t n, const std::string& who) {
  for (int64_t i = 0; i < n; ++i) {
    if (bits_of(actual[i]) == bits_of(expected[i])) continue;
    char text[160];
    snprintf(text, sizeof text, "element %lld is %.9g, elsewhere %.9g", static_cast<long long>(i),
             static_cast<double>(actual[i]), static_cast<double>(expected[i]));
    fail(who + ": " + text);
  }
}

inline void require_close(float actual, double expected, double bound, int64_t i) {
  const bool close = std::isfinite(expected) ? std::fabs(actual - expected) <= bound
                     : std::isnan(expected)  ? std::isnan(actual)
                                             : actual == expected;
  if (close) return;
  char text[160];
  snprintf(text, sizeof text, "element %lld is %.9g instead of %.12g +- %.3g", static_cast<long long>(i), actual,
           expected, bound);
  fail(text);
}

// One line of the report: how many cases, and a checksum (FNV-1a) of all results.
class Op {
 public:
  explicit Op(std::string name) : name_(std::move(name)) {}
  ~Op() { printf("%-18s %4d cases  %016llx\n", name_.c_str(), cases_, static_cast<unsigned long long>(checksum_)); }

  void begin(const std::string& description) {
    ++cases_;
    current_case = name_ + " " + description;
    fprintf(stderr, "%s\n", current_case.c_str());
  }
  template <class T>
  void digest(const T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t bits = bits_of(values[i]);
      for (size_t byte = 0; byte < sizeof(T); ++byte) {
        checksum_ = (checksum_ ^ (bits >> (8 * byte) & 255)) * 0x100000001b3u;
      }
    }
  }
  // Runs the op on every setting, requires the same bits of each, and returns them. run(pool, y) fills y[0..n).
  template <class T, class Run>
  std::vector<T> everywhere(int64_t n, const Run& run) {
    std::vector<T> first;
    for (const Setting& setting : settings) {
      Exact<T> y(n);
      require(run(setting.pool, y.data()) == kOk, "out of memory");
      if (&setting == &settings[0]) first = y.copy();
      else require_same(y.data(), first.data(), n, setting.name);
    }
    digest(first.data(), n);
    return first;
  }

 private:
  std::string name_;
  int cases_ = 0;
  uint64_t checksum_ = 0xcbf29ce484222325u;
};

template <class... Numbers>
std::string describe(const char* format, Numbers... numbers) {
  char text[256];
  snprintf(text, sizeof text, format, static_cast<long long>(numbers)...);
  return text;
}

void exercise_linear();
void exercise_attention();
void exercise_rows();
