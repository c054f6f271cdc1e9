// What the C++ kernels share: vectors of floats as GCC and Clang write them, so that one source
// serves AVX-512, AVX2 and NEON, and elementwise functions that are accurate to a few ulp.
// Prepended to every .cpp of this folder by native.py.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
constexpr int V = 16;  // floats per vector
#else
constexpr int V = 8;
#endif
typedef float vec __attribute__((vector_size(4 * V)));
typedef int32_t ivec __attribute__((vector_size(4 * V)));
typedef float uvec __attribute__((vector_size(4 * V), aligned(4)));  // any address

static inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<uvec*>(p) = v; }
// Stores past the cache where the processor can: for what is written whole and read much later.
static inline void stream(float* p, vec v) {
#ifdef __AVX512F__
  if (((uintptr_t)p & 63) == 0) return __builtin_ia32_movntps512(p, v);
#endif
  store(p, v);
}
// Makes streamed stores visible to other threads.
static inline void stream_done() {
#ifdef __AVX512F__
  __builtin_ia32_sfence();
#endif
}
static inline vec splat(float x) { return x - vec{}; }  // compiles to a broadcast alone
static inline vec pick(ivec mask, vec a, vec b) { return mask ? a : b; }
static inline vec vmax(vec a, vec b) { return (a > b) | (a != a) ? a : b; }
static inline vec vmin(vec a, vec b) { return (a < b) | (a != a) ? a : b; }

// Adds up a vector in a fixed order.
static inline float sum(vec v) {
  for (int w = V / 2; w > 0; w /= 2) {
    ivec down;
    for (int i = 0; i < V; i++) down[i] = (i + w) % V;
    v += __builtin_shuffle(v, down);
  }
  return v[0];
}

// e^x by range reduction and a polynomial of degree 6 (Cephes); 1 ulp, 0 below -87.3, inf above
// 88.7; NaN stays NaN.
static inline vec exp(vec x) {
  const vec high = splat(88.72283f), low = splat(-87.33654f);
  vec c = pick(x > high, high, pick(x < low, low, x));
  vec n = c * 1.44269504088896341f;
  ivec k = __builtin_convertvector(n + pick(n < 0, splat(-0.5f), splat(0.5f)), ivec);
  vec f = __builtin_convertvector(k, vec);
  vec r = c - f * 0.693359375f + f * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec half = k >> 1;  // two steps: 2^128 is not a float
  ivec a = (half + 127) << 23, b = (k - half + 127) << 23;
  vec y = p * (vec)a * (vec)b;
  y = pick(x < low, splat(0.0f), y);
  y = pick(x > high, splat(std::numeric_limits<float>::infinity()), y);
  return pick(x != x, x, y);
}

// bfloat16 in memory; arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
typedef uint16_t hvec __attribute__((vector_size(2 * V)));
typedef hvec uhvec __attribute__((aligned(2)));

static inline float value(float x) { return x; }
static inline float value(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline void round_to(float& to, float x) { to = x; }
static inline void round_to(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vec widen(const float* p) { return load(p); }
static inline vec widen(const bf16* p) {
  ivec bits = __builtin_convertvector(*reinterpret_cast<const uhvec*>(p), ivec) << 16;
  return (vec)bits;
}
static inline void narrow(float* p, vec x) { store(p, x); }
static inline void narrow(bf16* p, vec x) {
  ivec bits = (ivec)x;
  ivec up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  up = (x != x) ? ivec{} + 0x7fc0 : up;
  *reinterpret_cast<uhvec*>(p) = __builtin_convertvector(up, hvec);
}
static inline void stream(bf16* p, vec x) { narrow(p, x); }
