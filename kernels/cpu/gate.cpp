// The gate on the CPU: the router's product for a few tokens, the gate from logits to losses in one
// pass, and its gradient.
//
// Work is cut into blocks of fixed size whose partial sums are added in order, and every output has
// one writer, so results do not depend on the number of threads.
//
// T tokens, D model width, E experts, K top-k.

#include "routing.h"

// e^x for x <= 0 in half the time of `exp`; 0 below -87.3, NaN stays NaN.
static inline vec exp_below_0(vec x) {
  const vec low = splat(-87.33654f), round = splat(12582912.0f);  // 1.5 * 2^23
  vec c = pick(x < low, low, x), n = c * 1.44269504088896341f + round, f = n - round;
  vec r = c - f * 0.693359375f + f * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return pick(x < low, vec{}, p * (vec)(((ivec)n << 23) + (127 << 23)));
}

// Natural logarithm of normal floats (Cephes); finite for 0, NaN stays NaN.
static inline vec log(vec x) {
  ivec bits = (ivec)x;
  vec e = __builtin_convertvector((bits >> 23) - 126, vec);
  bits = (bits & 0x007fffff) | 0x3f000000;
  vec m = (vec)bits;
  ivec small = m < 0.707106781186547524f;
  e = pick(small, e - 1.0f, e);
  m = pick(small, m + m, m) - 1.0f;
  vec z = m * m, p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vec y = m * z * p - 2.12194440e-4f * e - 0.5f * z;
  return pick(x != x, x, m + y + 0.693359375f * e);
}

// ---- tokens @ weight.T ------------------------------------------------------------------------

// M tokens by N experts, both read along D.
template <int M, int N, class A, class B>
static inline void dots(const A* a, const B* b, i64 D, float* out, i64 E) {
  vec sums[M][N] = {};
  i64 d = 0;
  for (; d + V <= D; d += V) {
    vec x[M];
    for (int m = 0; m < M; m++) x[m] = widen(a + m * D + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      vec y = widen(b + n * D + d);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][n] += x[m] * y;
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float s = hsum(sums[m][n]);
      for (i64 i = d; i < D; i++) s += value(a[m * D + i]) * value(b[n * D + i]);
      out[m * E + n] = s;
    }
}

template <class A, class B>
static void multiply_few(const A* a, const B* b, i64 T, i64 D, i64 E, float* out) {
#pragma omp parallel for schedule(static) if (T * D * E > PARALLEL)
  for (i64 g = 0; g < (E + 3) / 4; g++) {
    i64 e = g * 4, t = 0;
    bool four = e + 4 <= E;
    for (; four && t + 4 <= T; t += 4) dots<4, 4>(a + t * D, b + e * D, D, out + t * E + e, E);
    for (; t < T; t++)
      if (four)
        dots<1, 4>(a + t * D, b + e * D, D, out + t * E + e, E);
      else
        for (i64 n = e; n < E; n++) dots<1, 1>(a + t * D, b + n * D, D, out + t * E + n, E);
  }
}

EXPORT void multiply(const void* tokens, int64_t tokens_bf16, const void* weight,
                     int64_t weight_bf16, i64 T, i64 D, i64 E, float* out) {
  auto a = static_cast<const float*>(tokens), b = static_cast<const float*>(weight);
  auto c = static_cast<const bf16*>(tokens), d = static_cast<const bf16*>(weight);
  if (tokens_bf16)
    weight_bf16 ? multiply_few(c, d, T, D, E, out) : multiply_few(c, b, T, D, E, out);
  else
    weight_bf16 ? multiply_few(a, d, T, D, E, out) : multiply_few(a, b, T, D, E, out);
}

// ---- top-k ------------------------------------------------------------------------------------

// Bit i is set where a[i] > b[i].
static inline uint32_t above(ivec a, ivec b) {
#ifdef __AVX512F__
  return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < V; i++) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
#endif
}

// Integers in the order of the floats; both zeros alike, NaN above all, as torch sorts.
static inline ivec key(vec x) {
  ivec bits = (ivec)x;
  ivec k = bits ^ ((bits >> 31) & 0x7fffffff);
  k = x == 0 ? ivec{} : k;
  return x != x ? ivec{} + 0x7fffffff : k;
}

// What `top` needs besides its input: W >= E floats, W a multiple of V.
struct Keys {
  std::vector<int32_t> keys, best;
  std::vector<uint64_t> ranks;
  Keys(i64 W, i64 K) : keys(W), best(K), ranks(K > V ? W : 0) {}
};

// The indices of the K largest of E values in descending order, ties in order of index. `values`
// has W >= E entries.
static void top(const float* values, i64 E, i64 W, i64 K, Keys& s, int32_t* ids) {
  int32_t* keys = s.keys.data();
  ivec lanes = ivec{} + REMOVED;
  for (i64 i = 0; i < W; i += V) {
    ivec k = key(load(values + i));
    if (i + V > E)
      for (i64 j = E - i; j < V; j++) k[j] = REMOVED;
    *reinterpret_cast<uivec*>(keys + i) = k;
    lanes = k > lanes ? k : lanes;
  }
  if (K > V) {
    for (i64 e = 0; e < E; e++) s.ranks[e] = rank_of(keys[e], e);
    std::partial_sort(s.ranks.begin(), s.ranks.begin() + K, s.ranks.begin() + E);
    for (i64 j = 0; j < K; j++) ids[j] = int32_t(uint32_t(s.ranks[j]));
    return;
  }
  // The K-th largest of the lanes' maxima is a lower bound that few keys reach.
  int32_t lane[V];
  std::memcpy(lane, &lanes, sizeof lane);
  ivec higher = {};
#pragma GCC unroll 16
  for (int j = 0; j < V; j++) higher -= (ivec{} + lane[j]) > lanes;
  lanes = higher < int32_t(K) ? lanes : ivec{} + 0x7fffffff;
  std::memcpy(lane, &lanes, sizeof lane);
  for (int w = V / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) lane[i] = std::min(lane[i], lane[i + w]);
  int32_t floor = lane[0] - 1;
  i64 n = 0;
  int32_t* best = s.best.data();
  for (i64 i = 0; i < W; i += V)
    for (uint32_t bits = above(*reinterpret_cast<uivec*>(keys + i), ivec{} + floor); bits;
         bits &= bits - 1) {
      i64 e = i + __builtin_ctz(bits);
      int32_t k = keys[e];
      if (k <= floor) continue;  // it rose since the comparison
      i64 j = n < K ? n++ : K - 1;
      for (; j > 0 && best[j - 1] < k; j--) best[j] = best[j - 1], ids[j] = ids[j - 1];
      best[j] = k, ids[j] = int32_t(e);
      if (n == K) floor = best[K - 1];
    }
}

// ---- gate -------------------------------------------------------------------------------------

enum { SOFTMAX, SIGMOID };
enum { NONE, RSAMPLE, GUMBEL };

// A row of E logits in W floats; what is added scores zero.
static inline void read_row(const float* from, i64 E, i64 W, float* row) {
  std::memcpy(row, from, 4 * E);
  std::fill(row + E, row + W, -INFINITE);
}

struct Softmax {
  float inverse, logsumexp, entropy;
};

// Writes e^(x - max); times `inverse` they are the softmax. NaN where a logit is NaN or +inf.
static Softmax softmax(const float* row, i64 W, float* out) {
  vec high = splat(-INFINITE), powers = {}, inner = {};
  for (i64 i = 0; i < W; i += V) {
    vec x = load(row + i);
    high = x > high ? x : high;
  }
  const float peak = hmax(high);
  for (i64 i = 0; i < W; i += V) {
    vec x = load(row + i) - peak, y = exp_below_0(x);
    store(out + i, y);
    powers += y;
    inner += pick(y == 0, y, y * x);  // 0 * -inf
  }
  const float s = hsum(powers), log_s = std::log(s);
  return {1 / s, peak + log_s, log_s - hsum(inner) / s};
}

// Writes the sigmoids and returns their sum.
static float sigmoid(const float* row, i64 W, float* out) {
  vec total = {};
  for (i64 i = 0; i < W; i += V) {
    vec y = 1.0f / (1.0f + exp(-load(row + i)));
    store(out + i, y);
    total += y;
  }
  return hsum(total);
}

struct Gate {
  const float *bias, *noise;  // [W] or null, [T, E] or null
  i64 E, W, K;
  int64_t score, noise_kind;
};

// The scores that `bias` is added to for the choice.
static void add_bias(const Gate& g, const float* row, float* scratch, float* values) {
  float scale = 1;
  if (g.score == SOFTMAX)
    scale = softmax(row, g.W, scratch).inverse;
  else
    sigmoid(row, g.W, scratch);
  for (i64 i = 0; i < g.W; i += V) store(values + i, load(scratch + i) * scale + load(g.bias + i));
}

static void choose(const Gate& g, const float* row, i64 t, float* scratch, float* values, Keys& s,
                   int32_t* ids) {
  const bool noisy = g.noise && g.noise_kind != NONE;
  const float* clean = row;
  if (g.bias && !(noisy && g.noise_kind == RSAMPLE)) {
    add_bias(g, row, scratch, values);
    clean = values;
  }
  if (!noisy) return top(clean, g.E, g.W, g.K, s, ids);
  int32_t first = 0;
  if (g.noise_kind == GUMBEL) top(clean, g.E, g.W, 1, s, &first);
  for (i64 e = 0; e < g.E; e++) values[e] = row[e] + g.noise[t * g.E + e];
  std::fill(values + g.E, values + g.W, -INFINITE);
  if (g.bias) add_bias(g, values, scratch, values);
  if (g.noise_kind == GUMBEL) {
    for (i64 e = 0; e < g.E; e++)
      values[e] =
          values[e] != values[e] ? -LARGEST : std::min(std::max(values[e], -LARGEST), LARGEST);
    values[first] = INFINITE;
  }
  top(values, g.E, g.W, g.K, s, ids);
}

// The weight of each expert's mean share in the balance loss: counts of E / all counted choices.
static inline float balance(i64 count, i64 T, i64 E, i64 K, i64 first_only) {
  return float(count) * (float(E) / float(std::max<i64>(T * (first_only ? 1 : K), 1)));
}

EXPORT void gate(const float* logits, const float* bias, const float* noise, i64 T, i64 E, i64 K,
                 i64 score, i64 noise_kind, i64 first_only, float* scores, int32_t* ids,
                 int32_t* counts, float* aux_loss, float* z_loss, float* entropy) {
  const i64 W = (E + V - 1) / V * V, blocks = (T + BLOCK - 1) / BLOCK;
  std::vector<float> wide_bias(bias ? W : 0), shares(blocks * W);
  if (bias) std::copy(bias, bias + E, wide_bias.begin());
  const Gate g{bias ? wide_bias.data() : nullptr, noise, E, W, K, score, noise_kind};
  std::vector<double> squares(blocks), entropies(blocks);
  std::vector<int32_t> firsts(E);
  std::fill(counts, counts + E, 0);
#pragma omp parallel if (T * W * 8 > PARALLEL)
  {
    std::vector<float> row(W), p(W), scratch(W), values(W);
    std::vector<int32_t> all(E), first(E);
    Keys keys(W, K);
#pragma omp for schedule(static)
    for (i64 b = 0; b < blocks; b++)
      for (i64 t = b * BLOCK; t < std::min(T, (b + 1) * BLOCK); t++) {
        read_row(logits + t * E, E, W, row.data());
        int32_t* chosen = ids + t * K;
        choose(g, row.data(), t, scratch.data(), values.data(), keys, chosen);
        first[chosen[0]]++;
        Softmax s = softmax(row.data(), W, p.data());
        float scale = s.inverse, share_scale = s.inverse;
        if (score == SIGMOID) {
          scale = 1;
          share_scale = 1 / (sigmoid(row.data(), W, p.data()) + EPSILON);
          vec total = {};
          for (i64 i = 0; i < W; i += V) {
            vec x = load(p.data() + i) * share_scale;
            total -= x * log(x);
          }
          s.entropy = hsum(total);
        }
        for (i64 j = 0; j < K; j++) {
          scores[t * K + j] = p[chosen[j]] * scale;
          all[chosen[j]]++;
        }
        float* share = shares.data() + b * W;
        for (i64 i = 0; i < W; i += V)
          store(share + i, load(share + i) + load(p.data() + i) * share_scale);
        squares[b] += s.logsumexp * s.logsumexp;
        entropies[b] += s.entropy;
      }
#pragma omp critical
    for (i64 e = 0; e < E; e++) counts[e] += all[e], firsts[e] += first[e];
  }
  std::vector<double> mean(E);
  double aux = 0, z = 0, h = 0;
  for (i64 b = 0; b < blocks; b++) {
    for (i64 e = 0; e < E; e++) mean[e] += shares[b * W + e];
    z += squares[b], h += entropies[b];
  }
  for (i64 e = 0; e < E; e++)
    aux += mean[e] * balance(first_only ? firsts[e] : counts[e], T, E, K, first_only);
  const double n = double(std::max<i64>(T, 1));
  *aux_loss = float(aux / n), *z_loss = float(z / n), *entropy = float(h / n);
}

// The gradient of the logits: `with_scores` whole, `without_scores` but for that of the scores.
EXPORT void gate_backward(const float* grad_scores, const float* grad_logits, const float* grad_aux,
                          const float* grad_z, const float* logits, const int32_t* ids, i64 T,
                          i64 E, i64 K, i64 score, i64 first_only, float* with_scores,
                          float* without_scores) {
  const i64 W = (E + V - 1) / V * V;
  std::vector<float> target(W);
  if (grad_aux) {
    std::vector<i64> counts(E);
    for (i64 i = 0; i < T * K; i += first_only ? K : 1) counts[ids[i]]++;
    for (i64 e = 0; e < E; e++)
      target[e] = *grad_aux / float(T) * balance(counts[e], T, E, K, first_only);
  }
#pragma omp parallel if (T * W * 8 > PARALLEL)
  {
    std::vector<float> row(W), p(W), q(W), g(W);
#pragma omp for schedule(static)
    for (i64 t = 0; t < T; t++) {
      read_row(logits + t * E, E, W, row.data());
      float total = 1, logsumexp = 0;  // of the probabilities; a softmax has a sum of 1
      if (score == SIGMOID) total = sigmoid(row.data(), W, p.data()) + EPSILON;
      if (score == SOFTMAX || grad_z) {
        Softmax s = softmax(row.data(), W, q.data());
        for (i64 i = 0; i < W; i += V) store(q.data() + i, load(q.data() + i) * s.inverse);
        logsumexp = s.logsumexp;
      }
      const float* probability = score == SOFTMAX ? q.data() : p.data();
      vec inner = {};
      for (i64 i = 0; grad_aux && i < W; i += V)
        inner += load(target.data() + i) * load(probability + i);
      const float mean = hsum(inner) / total, slope = grad_z ? 2 * *grad_z / float(T) : 0;
      for (i64 i = 0; i < W; i += V) {
        vec y = {}, x = load(probability + i);
        if (grad_aux) y = (load(target.data() + i) - mean) / total * x;
        if (grad_aux && score == SIGMOID) y *= 1 - x;
        if (grad_z) y += slope * logsumexp * load(q.data() + i);
        store(g.data() + i, y);
      }
      for (i64 e = 0; grad_logits && e < E; e++) g[e] += grad_logits[t * E + e];
      if (without_scores) std::memcpy(without_scores + t * E, g.data(), 4 * E);
      if (grad_scores && score == SOFTMAX) {
        float spread = 0;
        for (i64 r = t * K; r < t * K + K; r++) spread += grad_scores[r] * q[ids[r]];
        for (i64 i = 0; i < W; i += V)
          store(g.data() + i, load(g.data() + i) - load(q.data() + i) * spread);
      }
      for (i64 r = t * K; grad_scores && r < t * K + K; r++) {
        float x = probability[ids[r]];
        g[ids[r]] += grad_scores[r] * (score == SOFTMAX ? x : x * (1 - x));
      }
      std::memcpy(with_scores + t * E, g.data(), 4 * E);
    }
  }
}
