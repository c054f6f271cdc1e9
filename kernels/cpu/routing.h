// What gate.cpp and rows.cpp share. Inductor's flags turn the compiler's vectoriser off, so loops
// are vectorised by hand.

#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef int64_t i64;
typedef ivec uivec __attribute__((aligned(4)));

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LARGEST = std::numeric_limits<float>::max();
constexpr int32_t REMOVED = std::numeric_limits<int32_t>::min();  // below the key of any float
constexpr float EPSILON = 1e-20f;                                 // as in gate.py
constexpr i64 BLOCK = 64;                                         // tokens per partial sum
constexpr i64 PARALLEL = 1 << 17;  // steps of a few instructions that are worth waking threads for

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
};

// Folds a vector half by half, in a fixed order.
template <int N, class F>
static inline float fold(typename Lanes<N>::type v, F f) {
  if constexpr (N == 4) {
    return f(f(v[0], v[2]), f(v[1], v[3]));
  } else {
    typename Lanes<N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
    return fold<N / 2>(f(low, high), f);
  }
}
static inline float hsum(vec v) {
  return fold<V>(v, [](auto a, auto b) { return a + b; });
}
static inline float hmax(vec v) {
  return fold<V>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// A 64-bit number that is smaller for a higher key, and for a lower index where keys are equal.
static inline uint64_t rank_of(int32_t key, i64 index) {
  return uint64_t(~(uint32_t(key) ^ 0x80000000u)) << 32 | uint64_t(index);
}
