// Between tokens and rows on the CPU: the counting sort of `assign`, combine weights, the gathers.
//
// Every output has one writer and is summed in one order, whatever the number of threads.
//
// T tokens, D model width, E experts, K top-k, R = T * K rows.

#include "routing.h"

// ---- assign -----------------------------------------------------------------------------------

// Integers in the order of priorities; NaN below all, both infinities as the largest finite floats.
static inline int32_t priority_key(float x) {
  if (x != x) return REMOVED;
  x = x == 0 ? 0 : std::min(std::max(x, -LARGEST), LARGEST);
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Marks with -1 the routes that are not among the first `capacity` of their expert. The order of
// position runs over all first choices before any second.
static void drop(const int32_t* ids, const float* priority, i64 token_stride, i64 choice_stride,
                 i64 T, i64 K, i64 E, i64 capacity, int32_t* slots) {
  std::vector<i64> ends(E);
  if (!priority) {
    for (i64 j = 0; j < K; j++)
      for (i64 r = j; r < T * K; r += K) slots[r] = ends[ids[r]]++ < capacity ? 0 : -1;
    return;
  }
  std::fill(slots, slots + T * K, 0);
  std::vector<uint64_t> ranks(T * K);
  for (i64 r = 0; r < T * K; r++) ends[ids[r]]++;
  for (i64 e = 0, at = 0; e < E; e++) at += std::exchange(ends[e], at);
  for (i64 j = 0; j < K; j++)
    for (i64 t = 0; t < T; t++) {
      float x = priority[t * token_stride + j * choice_stride];
      ranks[ends[ids[t * K + j]]++] = rank_of(priority_key(x), j * T + t);
    }
#pragma omp parallel for schedule(dynamic) if (T * K > PARALLEL)
  for (i64 e = 0; e < E; e++) {
    i64 start = e ? ends[e - 1] : 0, kept = std::min(ends[e], start + capacity);
    auto at = ranks.begin();
    std::nth_element(at + start, at + kept, at + ends[e]);
    for (i64 i = kept; i < ends[e]; i++) {
      i64 q = uint32_t(ranks[i]);
      slots[q % T * K + q / T] = -1;
    }
  }
}

EXPORT void assign(const int32_t* ids, const float* priority, i64 token_stride, i64 choice_stride,
                   i64 T, i64 K, i64 E, i64 capacity, int32_t* slots, int32_t* order,
                   int32_t* offsets) {
  const i64 R = T * K, parts = R > PARALLEL ? omp_get_max_threads() : 1;
  const bool drops = capacity < T;
  if (drops) drop(ids, priority, token_stride, choice_stride, T, K, E, capacity, slots);
  std::vector<int32_t> starts(parts * E);
#pragma omp parallel for schedule(static) if (parts > 1)
  for (i64 part = 0; part < parts; part++)
    for (i64 r = R * part / parts; r < R * (part + 1) / parts; r++)
      if (!drops || slots[r] >= 0) starts[part * E + ids[r]]++;
  int32_t rows = 0;
  for (i64 e = 0; e < E; e++) {
    for (i64 part = 0; part < parts; part++) rows += std::exchange(starts[part * E + e], rows);
    offsets[e] = rows;
  }
#pragma omp parallel for schedule(static) if (parts > 1)
  for (i64 part = 0; part < parts; part++)
    for (i64 r = R * part / parts; r < R * (part + 1) / parts; r++)
      if (!drops || slots[r] >= 0) {
        slots[r] = starts[part * E + ids[r]]++;
        order[slots[r]] = int32_t(r);
      }
  std::fill(order + rows, order + R, -1);
}

// ---- combine weights ----------------------------------------------------------------------------

enum { PROBABILITY, NORMALIZED, STRAIGHT_THROUGH, SUM };

// What the scores of the kept routes add up to.
static inline float kept_sum(const float* scores, const int32_t* slots, i64 K) {
  float total = 0;
  for (i64 j = 0; j < K; j++) total += slots[j] < 0 ? 0 : scores[j];
  return total + EPSILON;
}

EXPORT void combine_weights(const float* scores, const int32_t* slots, i64 T, i64 K,
                            i64 combine, float* weights) {
  for (i64 t = 0; t < T; t++, scores += K, slots += K, weights += K) {
    if (combine == SUM || (combine == STRAIGHT_THROUGH && K == 1)) {
      for (i64 j = 0; j < K; j++)  // a score that underflowed still counts as 1
        weights[j] = slots[j] < 0 ? 0 : 1 + (scores[j] - scores[j]);
      continue;
    }
    const float total = combine == PROBABILITY ? 1 : kept_sum(scores, slots, K);
    for (i64 j = 0; j < K; j++) weights[j] = (slots[j] < 0 ? 0 : scores[j]) / total;
  }
}

EXPORT void combine_weights_backward(const float* grad, const float* scores, const int32_t* slots,
                                     i64 T, i64 K, i64 combine, float* grad_scores) {
  for (i64 t = 0; t < T; t++, grad += K, scores += K, slots += K, grad_scores += K) {
    float total = 1, inner = 0;
    if (combine == NORMALIZED) {
      total = kept_sum(scores, slots, K);
      for (i64 j = 0; j < K; j++) inner += grad[j] * (slots[j] < 0 ? 0 : scores[j]) / total;
    }
    for (i64 j = 0; j < K; j++) grad_scores[j] = slots[j] < 0 ? 0 : (grad[j] - inner) / total;
  }
}

// ---- dispatch and combine ---------------------------------------------------------------------

// `width` and `stride` are in bytes.
EXPORT void dispatch(const char* tokens, const int32_t* order, i64 R, i64 K, i64 width, i64 stride,
                     char* rows) {
#pragma omp parallel for schedule(static) if (R * width / 4 > PARALLEL)
  for (i64 r = 0; r < R; r++)
    if (order[r] < 0)
      std::memset(rows + r * width, 0, width);
    else
      std::memcpy(rows + r * width, tokens + order[r] / K * stride, width);
}

template <class H>
static void combine_rows(const H* hidden, const float* weights, const int32_t* slots, i64 T, i64 K,
                         i64 D, H* out) {
#pragma omp parallel if (T * K * D > PARALLEL)
  {
    std::vector<const H*> rows(K);
    std::vector<float> w(K);
#pragma omp for schedule(static)
    for (i64 t = 0; t < T; t++) {
      i64 n = 0, d = 0;
      for (i64 r = t * K; r < t * K + K; r++)
        if (slots[r] >= 0) {
          rows[n] = hidden + slots[r] * D;
          w[n++] = weights ? weights[r] : 1;
        }
      for (; d + V <= D; d += V) {
        vec total = {};
        for (i64 j = 0; j < n; j++) total += w[j] * widen(rows[j] + d);
        narrow(out + t * D + d, total);
      }
      for (; d < D; d++) {
        float total = 0;
        for (i64 j = 0; j < n; j++) total += w[j] * value(rows[j][d]);
        round_to(out[t * D + d], total);
      }
    }
  }
}

template <class H>
static void combine_rows_backward(const H* grad, const H* hidden, const float* weights,
                                  const int32_t* order, const int32_t* slots, i64 T, i64 K, i64 D,
                                  i64 R, H* grad_hidden, float* grad_weights) {
#pragma omp parallel if (T * K * D > PARALLEL)
  {
#pragma omp for schedule(static) nowait
    for (i64 r = 0; r < T * K; r++) {
      const i64 slot = slots[r];
      grad_weights[r] = 0;
      if (slot < 0) continue;
      const H *g = grad + r / K * D, *h = hidden + slot * D;
      const float w = weights[r];
      vec products = {};
      i64 d = 0;
      for (; d + V <= D; d += V) {
        vec x = widen(g + d);
        products += x * widen(h + d);
        narrow(grad_hidden + slot * D + d, x * w);
      }
      float total = hsum(products);
      for (; d < D; d++) {
        total += value(g[d]) * value(h[d]);
        round_to(grad_hidden[slot * D + d], value(g[d]) * w);
      }
      grad_weights[r] = total;
    }
#pragma omp for schedule(static)
    for (i64 r = 0; r < R; r++)
      if (order[r] < 0) std::memset(grad_hidden + r * D, 0, D * sizeof(H));
  }
}

EXPORT void combine_f32(const float* hidden, const float* weights, const int32_t* slots, i64 T,
                        i64 K, i64 D, float* out) {
  combine_rows(hidden, weights, slots, T, K, D, out);
}
EXPORT void combine_bf16(const bf16* hidden, const float* weights, const int32_t* slots, i64 T,
                         i64 K, i64 D, bf16* out) {
  combine_rows(hidden, weights, slots, T, K, D, out);
}
EXPORT void combine_backward_f32(const float* grad, const float* hidden, const float* weights,
                                 const int32_t* order, const int32_t* slots, i64 T, i64 K, i64 D,
                                 i64 R, float* grad_hidden, float* grad_weights) {
  combine_rows_backward(grad, hidden, weights, order, slots, T, K, D, R, grad_hidden, grad_weights);
}
EXPORT void combine_backward_bf16(const bf16* grad, const bf16* hidden, const float* weights,
                                  const int32_t* order, const int32_t* slots, i64 T, i64 K, i64 D,
                                  i64 R, bf16* grad_hidden, float* grad_weights) {
  combine_rows_backward(grad, hidden, weights, order, slots, T, K, D, R, grad_hidden, grad_weights);
}
