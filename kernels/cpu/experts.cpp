// Grouped two-layer MLPs in float32, forward: gather, matmul, activation, matmul, combine.
//
// The lanes of the vectors are tokens. A chunk of an expert's rows is packed, transposed,
// into panels of up to 3 vectors; the weights are then read as they are in memory, each element
// once per chunk, broadcast and multiplied into a tile of 8 weight rows by 3 vectors of tokens. The
// activated values come out in the panel layout that the second matmul reads, and never leave the
// cache.
//
// Up to FEW rows would leave the lanes empty: there the lanes are the contraction, rows are
// not transposed, and the work is a few matrix-vector products that read the weights once.
//
// All threads work on one chunk together, on different rows of the weights. Every output is summed
// in one order whatever their number.

#include "activation.h"

constexpr int N = 3;          // vectors of tokens in a panel
constexpr int PANEL = N * V;  // tokens in a panel
constexpr int CHUNK = 4;      // panels that share one pass over the weights
constexpr int FEW = 4;        // rows up to which the lanes are the contraction

// c[i][v] += a[i][k] * b[k][v] over k, M rows of a, W vectors of b. Prefetches what is `ahead`.
template <int M, int W, typename A>
static inline void multiply(const A* const* a, i64 ahead, const float* b, i64 ld, i64 K,
                            vec (&c)[M][W]) {
  const A* r[M];
  vec s[M][W];
  for (int i = 0; i < M; i++) r[i] = a[i];
  for (int i = 0; i < M; i++)
    for (int v = 0; v < W; v++) s[i][v] = c[i][v];
  constexpr int LINE = 64 / sizeof(A);
  for (i64 k = 0; k < K; k += LINE) {
    for (int i = 0; i < M; i++) __builtin_prefetch(r[i] + k + ahead);
    i64 end = std::min<i64>(k + LINE, K);
    for (i64 j = k; j < end; j++, b += ld) {
      vec x[W];
      for (int v = 0; v < W; v++) x[v] = load(b + v * V);
      for (int i = 0; i < M; i++) {
        vec w = splat(value(r[i][j]));
        for (int v = 0; v < W; v++) s[i][v] += w * x[v];
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < W; v++) c[i][v] = s[i][v];
}

// Transposes V rows of V floats in place.
static inline void transpose(vec (&r)[V]) {
  for (int w = 1; w < V; w *= 2) {
    ivec low, high;
    for (int j = 0; j < V; j++) {
      low[j] = j & w ? V + j - w : j;
      high[j] = j & w ? V + j : j + w;
    }
    for (int i = 0; i < V; i++)
      if (!(i & w)) {
        vec a = r[i], b = r[i + w];
        r[i] = __builtin_shuffle(a, b, low);
        r[i + w] = __builtin_shuffle(a, b, high);
      }
  }
}

// c[i] += the products of M rows of `a` with T rows of `b`: lane t belongs to row t.
template <int M, int T, typename A>
static inline void dots(const A* const* a, i64 ahead, const float* b, i64 K, vec* c) {
  vec s[M][T] = {};
  i64 k = 0;
  for (; k + V <= K; k += V) {
    vec x[T];
    for (int t = 0; t < T; t++) x[t] = load(b + t * K + k);
    for (int i = 0; i < M; i++) {
      __builtin_prefetch(a[i] + k + ahead);
      vec w = widen(a[i] + k);
      for (int t = 0; t < T; t++) s[i][t] += w * x[t];
    }
  }
  vec r[V] = {};
  for (int i = 0; i < M; i++)
    for (int t = 0; t < T; t++) r[i * T + t] = s[i][t];
  transpose(r);
  vec total = r[0];
  for (int j = 1; j < V; j++) total += r[j];
  for (int i = 0; i < M; i++)
    for (int t = 0; t < T; t++) {
      float tail = 0;
      for (i64 j = k; j < K; j++) tail += value(a[i][j]) * b[t * K + j];
      c[i][t] += total[i * T + t] + tail;
    }
}

template <int M, typename A>
static inline void few(const A* const* a, i64 ahead, const float* b, int rows, i64 K, vec* c) {
  constexpr int P = M * 4 > V ? V / 4 : M;  // M * T products are summed in one vector
  if (rows == 1) return dots<M, 1>(a, ahead, b, K, c);
  if (rows == 2 && M * 2 <= V) return dots<(M * 2 <= V ? M : 1), 2>(a, ahead, b, K, c);
  for (int i = 0; i < M; i += P) {
    if (rows == 2)
      dots<P, 2>(a + i, ahead, b, K, c + i);
    else if (rows == 3)
      dots<P, 3>(a + i, ahead, b, K, c + i);
    else
      dots<P, 4>(a + i, ahead, b, K, c + i);
  }
}

// The panel layout: element (k, t) of a panel with W vectors is at k * W * V + t; with few rows,
// element (k, t) is at t * K + k.
struct Panel {
  i64 first;  // first row
  int rows;   // rows that are real; the lanes after them hold zeros
  int W;
  bool few;
};

// Packs columns [from, to) of a panel's rows; `row(t)` is the address of a row.
template <typename X, typename Row>
static void pack(const Panel& p, i64 from, i64 to, i64 K, float* out, Row row) {
  if (p.few) {
    for (int t = 0; t < p.rows; t++)
      for (i64 k = from; k < to; k++) out[t * K + k] = value(row(p.first + t)[k]);
    return;
  }
  for (i64 k = from; k < to; k += V)
    for (int v = 0; v < p.W; v++) {
      vec r[V] = {};
      int n = std::min(V, p.rows - v * V), w = (int)std::min<i64>(V, to - k);
      for (int t = 0; t < n; t++) {
        const X* x = row(p.first + v * V + t) + k;
        if (w == V)
          r[t] = widen(x);
        else
          for (int j = 0; j < w; j++) r[t][j] = value(x[j]);
      }
      transpose(r);
      for (int j = 0; j < w; j++) store(out + (k + j) * p.W * V + v * V, r[j]);
    }
}

// The reverse for V columns, held as tile[column][token]: writes `w` numbers to each row.
template <typename X, bool LATER, typename Row>
static void unpack(const Panel& p, const float* tile, int w, Row row) {
  for (int v = 0; v < p.W; v++) {
    vec r[V];
    for (int j = 0; j < V; j++) r[j] = load(tile + j * PANEL + v * V);
    transpose(r);
    int n = std::min(V, p.rows - v * V);
    for (int t = 0; t < n; t++) {
      X* x = row(p.first + v * V + t);
      if (w < V)
        for (int j = 0; j < w; j++) round_to(x[j], r[t][j]);
      else if (LATER)
        stream(x, r[t]);
      else
        narrow(x, r[t]);
    }
  }
}

template <typename X>
struct Forward {
  const X *tokens, *up, *up_bias, *down, *down_bias;
  const float* weights;
  const int32_t *order, *slots, *offsets;
  X *out, *hidden;
  float *rows, *packed, *active;  // scratch: [R, O]; [CHUNK, D, PANEL]; [CHUNK, F, PANEL]
  i64 T, D, F, O, E, K;
  int act, gated;

  // `M` hidden features of one panel, from `f` on: matmul, bias, activation.
  template <int M, int W>
  void hidden_tile(const Panel& p, const X* w, const X* bias, const float* x, float* active, i64 f,
                   float* gate_out, float* up_out) {
    constexpr int R = 2 * M;
    const X* a[R];
    vec c[R][W];
    int halves = gated ? 2 : 1;
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < M; i++) {
        i64 feature = (h && gated ? F : 0) + f + i;
        a[h * M + i] = w + feature * D;
        float b = bias ? value(bias[feature]) : 0.0f;
        for (int v = 0; v < W; v++) c[h * M + i][v] = splat(b);
      }
    if (p.few) {
      vec s[R];
      for (int i = 0; i < R; i++) s[i] = c[i][0];
      if (gated)
        few<R>(a, M * D, x, p.rows, D, s);
      else
        few<M>(a, M * D, x, p.rows, D, s);
      for (int i = 0; i < R; i++) c[i][0] = s[i];
    } else if (gated) {
      multiply<R, W>(a, M * D, x, W * V, D, c);
    } else {
      vec s[M][W];
      for (int i = 0; i < M; i++)
        for (int v = 0; v < W; v++) s[i][v] = c[i][v];
      multiply<M, W>(a, M * D, x, W * V, D, s);
      for (int i = 0; i < M; i++)
        for (int v = 0; v < W; v++) c[i][v] = s[i][v];
    }
    for (int i = 0; i < M; i++)
      for (int v = 0; v < W; v++) {
        vec y = activate(act, c[i][v]);
        if (halves == 2) y *= c[M + i][v];
        if (p.few)
          for (int t = 0; t < p.rows; t++) active[t * F + f + i] = y[t];
        else
          store(active + (f + i) * W * V + v * V, y);
        if (hidden) {
          store(gate_out + i * PANEL + v * V, c[i][v]);
          if (halves == 2) store(up_out + i * PANEL + v * V, c[M + i][v]);
        }
      }
  }

  // V hidden features of one panel.
  template <int W>
  void hidden_block(const Panel& p, i64 e, const float* x, float* active, i64 f) {
    const i64 H = gated ? 2 * F : F;
    const X* w = up + e * H * D;
    const X* bias = up_bias ? up_bias + e * H : nullptr;
    float tile[2][V * PANEL];
    int n = (int)std::min<i64>(V, F - f), i = 0;
    for (; i + 4 <= n; i += 4)
      hidden_tile<4, W>(p, w, bias, x, active, f + i, tile[0] + i * PANEL, tile[1] + i * PANEL);
    for (; i < n; i++)
      hidden_tile<1, W>(p, w, bias, x, active, f + i, tile[0] + i * PANEL, tile[1] + i * PANEL);
    if (!hidden) return;
    for (int h = 0; h < (gated ? 2 : 1); h++)
      unpack<X, true>(p, tile[h], n, [&](i64 r) { return hidden + r * H + h * F + f; });
  }

  template <int M, int W>
  void out_tile(const Panel& p, const X* w, const X* bias, const float* active, i64 o,
                float* tile) {
    const X* a[M];
    vec c[M][W];
    for (int i = 0; i < M; i++) {
      a[i] = w + (o + i) * F;
      float b = bias ? value(bias[o + i]) : 0.0f;
      for (int v = 0; v < W; v++) c[i][v] = splat(b);
    }
    if (p.few) {
      vec s[M];
      for (int i = 0; i < M; i++) s[i] = c[i][0];
      few<M>(a, M * F, active, p.rows, F, s);
      for (int i = 0; i < M; i++) c[i][0] = s[i];
    } else {
      multiply<M, W>(a, M * F, active, W * V, F, c);
    }
    for (int i = 0; i < M; i++)
      for (int v = 0; v < W; v++) store(tile + i * PANEL + v * V, c[i][v]);
  }

  // V outputs of one panel, weighted; straight to the tokens if each has one route.
  template <int W>
  void out_block(const Panel& p, i64 e, const float* active, i64 o) {
    float tile[V * PANEL];
    const X* w = down + e * O * F;
    const X* bias = down_bias ? down_bias + e * O : nullptr;
    int n = (int)std::min<i64>(V, O - o), i = 0;
    for (; i + 8 <= n; i += 8) out_tile<8, W>(p, w, bias, active, o + i, tile + i * PANEL);
    for (; i < n; i++) out_tile<1, W>(p, w, bias, active, o + i, tile + i * PANEL);
    if (weights)
      for (int v = 0; v < W; v++) {
        vec s = {};
        for (int t = 0; t < V && v * V + t < p.rows; t++)
          s[t] = weights[order[p.first + v * V + t]];
        for (int j = 0; j < n; j++)
          store(tile + j * PANEL + v * V, load(tile + j * PANEL + v * V) * s);
      }
    if (K == 1)
      unpack<X, false>(p, tile, n, [&](i64 r) { return out + (i64)order[r] * O + o; });
    else
      unpack<float, false>(p, tile, n, [&](i64 r) { return rows + r * O + o; });
  }

  template <typename Body>
  static void with_width(int W, Body body) {
    if (W == 1)
      body(std::integral_constant<int, 1>());
    else if (W == 2)
      body(std::integral_constant<int, 2>());
    else
      body(std::integral_constant<int, 3>());
  }

  // One chunk of an expert's rows, by all threads.
  void chunk(i64 e, i64 first, i64 end) {
    Panel panels[CHUNK];
    int count = 0;
    for (i64 r = first; r < end; r += PANEL, count++) {
      int n = (int)std::min<i64>(PANEL, end - r);
      panels[count] = {r, n, (n + V - 1) / V, n <= FEW};
    }
    auto row = [&](i64 r) { return tokens + (i64)(order[r] / K) * D; };
    const i64 packs = (D + V - 1) / V, ups = (F + V - 1) / V, outs = (O + V - 1) / V;
#pragma omp for schedule(static) collapse(2)
    for (int p = 0; p < count; p++)
      for (i64 k = 0; k < packs; k++)
        pack<X>(panels[p], k * V, std::min((k + 1) * V, D), D, packed + p * D * PANEL, row);
#pragma omp for schedule(static)
    for (i64 f = 0; f < ups; f++)
      for (int p = 0; p < count; p++)
        with_width(panels[p].W, [&](auto W) {
          hidden_block<W.value>(panels[p], e, packed + p * D * PANEL, active + p * F * PANEL,
                                f * V);
        });
#pragma omp for schedule(static)
    for (i64 o = 0; o < outs; o++)
      for (int p = 0; p < count; p++)
        with_width(panels[p].W, [&](auto W) {
          out_block<W.value>(panels[p], e, active + p * F * PANEL, o * V);
        });
  }

  // Whether every index of the table points to where there is something.
  bool sound() const {
    for (i64 e = 0, start = 0; e < E; start = offsets[e++])
      if (offsets[e] < start || offsets[e] > T * K) return false;
    for (i64 r = 0; r < (E ? offsets[E - 1] : 0); r++)
      if (order[r] < 0 || order[r] >= T * K) return false;
    for (i64 r = 0; r < T * K; r++)
      if (slots[r] >= T * K) return false;
    return true;
  }

  bool run() {
    if (!sound()) return false;
    const i64 R = T * K, H = gated ? 2 * F : F, used = E ? offsets[E - 1] : 0;
#pragma omp parallel if (R * D * F > 1 << 20)
    {
      for (i64 e = 0, start = 0; e < E; start = offsets[e++])
        for (i64 r = start; r < offsets[e]; r += CHUNK * PANEL)
          chunk(e, r, std::min<i64>(r + CHUNK * PANEL, offsets[e]));
      if (hidden) {
        stream_done();
#pragma omp for schedule(static)
        for (i64 r = used; r < R; r++) memset(hidden + r * H, 0, H * sizeof(X));
      }
#pragma omp for schedule(static)
      for (i64 t = 0; t < T; t++) combine(t);
    }
    return true;
  }

  // Sums a token's rows; with one route only dropped tokens are left to do.
  void combine(i64 t) {
    X* y = out + t * O;
    if (K == 1) {
      if (slots[t] < 0) memset(y, 0, O * sizeof(X));
      return;
    }
    for (i64 o = 0; o < O; o += V) {
      int w = (int)std::min<i64>(V, O - o);
      vec s = {};
      for (i64 k = 0; k < K; k++) {
        i64 slot = slots[t * K + k];
        if (slot < 0) continue;
        const float* r = rows + slot * O + o;
        if (w == V)
          s += load(r);
        else
          for (int j = 0; j < w; j++) s[j] += r[j];
      }
      if (w == V)
        narrow(y + o, s);
      else
        for (int j = 0; j < w; j++) round_to(y[o + j], s[j]);
    }
  }
};

#define FORWARD(NAME, X)                                                                     \
  extern "C" i64 NAME(const X* tokens, const float* weights, const X* up, const X* up_bias,  \
                      const X* down, const X* down_bias, const int32_t* order,               \
                      const int32_t* slots, const int32_t* offsets, X* out, X* hidden,       \
                      float* rows, float* packed, float* active, i64 T, i64 D, i64 F, i64 O, \
                      i64 E, i64 K, int act, int gated) {                                    \
    return Forward<X>{tokens,  up,  up_bias, down, down_bias, weights, order, slots,         \
                      offsets, out, hidden,  rows, packed,    active,  T,     D,             \
                      F,       O,   E,       K,    act,       gated}                         \
        .run();                                                                              \
  }
FORWARD(experts_float, float)
FORWARD(experts_bfloat16, bf16)
