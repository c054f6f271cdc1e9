// Grouped two-layer MLPs in float32, backward, for all experts in one call.
//
// Rows are taken in chunks of one expert's. Everything is row-major, the vectors along features:
// weight gradients and row gradients are then both products of a broadcast element by a row of the
// other operand, which is packed into blocks of 3 vectors once per chunk. Scratch rows are padded,
// so that their strides are not powers of two. Gradients of weights are written in place, expert by
// expert; nothing is added atomically, and no sum depends on the number of threads.

#include "activation.h"

constexpr int W = 3;          // vectors in a block of columns
constexpr int BLOCK = W * V;  // columns in a block

// c[i][v] += a[i * row + k * step] * b[k][v] over k.
template <int M>
static inline void multiply(const float* a, i64 row, i64 step, const float* b, i64 K,
                            vec (&c)[M][W]) {
  const float* r[M];
  vec s[M][W] = {};
  for (int i = 0; i < M; i++) r[i] = a + i * row;
  for (i64 k = 0; k < K; k++, b += BLOCK) {
    vec x[W];
    for (int v = 0; v < W; v++) x[v] = load(b + v * V);
    for (int i = 0; i < M; i++) {
      vec w = splat(r[i][k * step]);
      for (int v = 0; v < W; v++) s[i][v] += w * x[v];
    }
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < W; v++) c[i][v] = s[i][v];
}

// One matmul C = A B, or C += A B: `a(i, k)` at a + i * row + k * step, B row-major, C by rows.
struct Product {
  const float* a;
  i64 row, step;
  const float* b;
  i64 ldb, M, N, K;
  bool add;

  template <int H, typename Row>
  void tile(i64 i, i64 j, const float* block, Row out) const {
    vec c[H][W];
    multiply<H>(a + i * row, row, step, block, K, c);
    i64 n = std::min<i64>(BLOCK, N - j);
    for (int h = 0; h < H; h++) {
      float* y = out(i + h) + j;
      for (int v = 0; v < W; v++) {
        i64 w = std::min<i64>(V, n - v * V);
        if (w == V)
          store(y + v * V, add ? load(y + v * V) + c[h][v] : c[h][v]);
        else
          for (i64 t = 0; t < w; t++) y[v * V + t] = c[h][v][t] + (add ? y[v * V + t] : 0.0f);
      }
    }
  }

  void pack(i64 j, float* block) const {
    i64 n = std::min<i64>(BLOCK, N - j);
    for (i64 k = 0; k < K; k++) {
      if (n == BLOCK) {
        for (int v = 0; v < W; v++) store(block + k * BLOCK + v * V, load(b + k * ldb + j + v * V));
      } else {
        memcpy(block + k * BLOCK, b + k * ldb + j, n * sizeof(float));
        memset(block + k * BLOCK + n, 0, (BLOCK - n) * sizeof(float));
      }
    }
  }

  // By all threads, each on blocks of columns; no barrier at the end.
  template <typename Row>
  void by_columns(float* block, Row out) const {
#pragma omp for schedule(static) nowait
    for (i64 j = 0; j < N; j += BLOCK) {
      pack(j, block);
      i64 i = 0;
      for (; i + 8 <= M; i += 8) tile<8>(i, j, block, out);
      if (i + 4 <= M) tile<4>(i, j, block, out), i += 4;
      if (i + 2 <= M) tile<2>(i, j, block, out), i += 2;
      if (i < M) tile<1>(i, j, block, out);
    }
  }

  // By all threads, each on rows: where A is the large operand and is to be read once. `shared`
  // takes all of B, `strip` 8 rows of A.
  template <typename Row>
  void by_rows(float* shared, float* strip, Row out) const {
#pragma omp for schedule(static)
    for (i64 j = 0; j < N; j += BLOCK) pack(j, shared + j * K);
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < M; i += 8) {
      const int h = (int)std::min<i64>(8, M - i);
      for (i64 k = 0; k < K; k++)
        for (int t = 0; t < 8; t++) strip[k * 8 + t] = t < h ? a[(i + t) * row + k * step] : 0.0f;
      Product own = *this;
      own.a = strip - i, own.row = 1, own.step = 8;
      for (i64 j = 0; j < N; j += BLOCK) {
        if (h == 8)
          own.tile<8>(i, j, shared + j * K, out);
        else
          for (int t = 0; t < h; t++) own.tile<1>(i + t, j, shared + j * K, out);
      }
    }
  }
};

struct Backward {
  const float *grad, *tokens, *weights, *up, *down, *down_bias, *hidden;
  const int32_t *order, *slots, *offsets;
  float *grad_tokens, *grad_weights, *grad_up, *grad_up_bias, *grad_down, *grad_down_bias;
  float *back, *inner;      // scratch: [R, D] row gradients if K > 1; [R] inner products
  i64 T, D, F, O, E, K, C;  // C: rows in a chunk
  int act, gated;
  i64 H, lo, ld, lf, lh;  // strides of the scratch rows
  float *go, *xr, *ga, *gh, *shared;

  // Row r of a chunk: from the gradient of the activated values to that of the hidden ones.
  void row(i64 r, i64 local) {
    const float* h = hidden + r * H;
    float *g = ga + local * lf, *out = gh + local * lh;
    const float w = weights ? weights[order[r]] : 1.0f;
    vec product = {};
    for (i64 f = 0; f < F; f += V) {
      i64 n = std::min<i64>(V, F - f);
      vec x = {}, u = splat(1.0f), y = {};
      if (n == V) {
        x = load(h + f), y = load(g + f);
        if (gated) u = load(h + F + f);
      } else {
        for (i64 t = 0; t < n; t++) {
          x[t] = h[f + t], y[t] = g[f + t];
          if (gated) u[t] = h[F + f + t];
        }
      }
      vec a = activate(act, x), value = a * u, scaled = y * w;
      vec gate = scaled * u * slope(act, x), rest = scaled * a;
      product += y * value;  // zero in lanes past the end
      if (n == V) {
        store(g + f, value * w);
        store(out + f, gate);
        if (gated) store(out + F + f, rest);
      } else {
        for (i64 t = 0; t < n; t++) {
          g[f + t] = value[t] * w;
          out[f + t] = gate[t];
          if (gated) out[F + f + t] = rest[t];
        }
      }
    }
    inner[r] = sum(product);
  }

  void gather(i64 e, i64 r, i64 local) {
    const i64 t = order[r] / K;
    memcpy(go + local * lo, grad + t * O, O * sizeof(float));
    if (grad_up) memcpy(xr + local * ld, tokens + t * D, D * sizeof(float));
  }

  void chunk(i64 e, i64 first, i64 end, float* block) {
    const i64 n = end - first;
    const bool add = first > (e ? offsets[e - 1] : 0);
#pragma omp for schedule(static)
    for (i64 i = 0; i < n; i++) gather(e, first + i, i);
    Product{go, lo, 1, down + e * O * F, F, n, F, O, false}.by_columns(
        block, [&](i64 i) { return ga + i * lf; });
#pragma omp barrier
#pragma omp for schedule(static)
    for (i64 i = 0; i < n; i++) {
      row(first + i, i);
      if (down_bias) {
        float s = 0;
        for (i64 o = 0; o < O; o++) s += go[i * lo + o] * down_bias[e * O + o];
        inner[first + i] += s;
      }
    }
    if (grad_tokens)
      Product{gh, lh, 1, up + e * H * D, D, n, D, H, false}.by_columns(block, [&](i64 i) {
        return K == 1 ? grad_tokens + (i64)order[first + i] * D : back + (first + i) * D;
      });
    if (grad_up) {
      Product{go, 1, lo, ga, lf, O, F, n, add}.by_columns(
          block, [&](i64 o) { return grad_down + (e * O + o) * F; });
      Product{gh, 1, lh, xr, ld, H, D, n, add}.by_rows(
          shared, block, [&](i64 h) { return grad_up + (e * H + h) * D; });
      if (grad_up_bias) column_sums(gh, lh, H, nullptr, n, first, grad_up_bias + e * H, add);
      if (grad_down_bias) column_sums(go, lo, O, weights, n, first, grad_down_bias + e * O, add);
    }
#pragma omp barrier
  }

  void column_sums(const float* x, i64 stride, i64 width, const float* scale, i64 n, i64 first,
                   float* out, bool add) {
#pragma omp for schedule(static) nowait
    for (i64 c = 0; c < width; c++) {
      float s = add ? out[c] : 0.0f;
      for (i64 i = 0; i < n; i++) s += x[i * stride + c] * (scale ? scale[order[first + i]] : 1.0f);
      out[c] = s;
    }
  }

  void token(i64 t) {
    for (i64 k = 0; k < K && grad_weights; k++) {
      const i64 slot = slots[t * K + k];
      grad_weights[t * K + k] = slot < 0 ? 0.0f : inner[slot];
    }
    if (!grad_tokens) return;
    float* y = grad_tokens + t * D;
    if (K == 1) {
      if (slots[t] < 0) memset(y, 0, D * sizeof(float));
      return;
    }
    memset(y, 0, D * sizeof(float));
    for (i64 k = 0; k < K; k++)
      if (const i64 slot = slots[t * K + k]; slot >= 0)
        for (i64 d = 0; d < D; d++) y[d] += back[slot * D + d];
  }

  // Experts without rows have no gradient.
  void zero(i64 e) {
#pragma omp single
    {
      memset(grad_up + e * H * D, 0, H * D * sizeof(float));
      memset(grad_down + e * O * F, 0, O * F * sizeof(float));
      if (grad_up_bias) memset(grad_up_bias + e * H, 0, H * sizeof(float));
      if (grad_down_bias) memset(grad_down_bias + e * O, 0, O * sizeof(float));
    }
  }

  void run(float* scratch, float* blocks, i64 longest) {
    H = gated ? 2 * F : F;
    lo = O + V, ld = D + V, lf = F + V, lh = H + V;
    go = scratch, xr = go + C * lo, ga = xr + C * ld, gh = ga + C * lf, shared = gh + C * lh;
#pragma omp parallel if (T * K * D * F > 1 << 20)
    {
      float* block = blocks + omp_get_thread_num() * longest * BLOCK;
      for (i64 e = 0, start = 0; e < E; start = offsets[e++]) {
        if (start == offsets[e] && grad_up) zero(e);
        for (i64 r = start; r < offsets[e]; r += C)
          chunk(e, r, std::min<i64>(r + C, offsets[e]), block);
      }
#pragma omp for schedule(static)
      for (i64 t = 0; t < T; t++) token(t);
    }
  }
};

extern "C" void experts_backward(const float* grad, const float* tokens, const float* weights,
                                 const float* up, const float* down, const float* down_bias,
                                 const float* hidden, const int32_t* order, const int32_t* slots,
                                 const int32_t* offsets, float* grad_tokens, float* grad_weights,
                                 float* grad_up, float* grad_up_bias, float* grad_down,
                                 float* grad_down_bias, float* back, float* inner, float* scratch,
                                 float* blocks, i64 T, i64 D, i64 F, i64 O, i64 E, i64 K, i64 C,
                                 i64 longest, int act, int gated) {
  Backward{grad,        tokens,
           weights,     up,
           down,        down_bias,
           hidden,      order,
           slots,       offsets,
           grad_tokens, grad_weights,
           grad_up,     grad_up_bias,
           grad_down,   grad_down_bias,
           back,        inner,
           T,           D,
           F,           O,
           E,           K,
           C,           act,
           gated}
      .run(scratch, blocks, longest);
}

// The elementwise half of the backward for rows in bfloat16, whose matmuls are the library's: turns
// `ga` [n, F] into the weighted activated values, writes `gh` [n, H] and the inner products [n].
extern "C" void slopes_bfloat16(const bf16* hidden, bf16* ga, bf16* gh, const float* row_weights,
                                float* inner, i64 n, i64 F, int act, int gated) {
  const i64 H = gated ? 2 * F : F;
#pragma omp parallel for schedule(static) if (n * F > 1 << 15)
  for (i64 i = 0; i < n; i++) {
    const float w = row_weights ? row_weights[i] : 1.0f;
    vec product = {};
    for (i64 f = 0; f < F; f += V) {
      const i64 m = std::min<i64>(V, F - f);
      vec x = {}, u = splat(1.0f), y = {};
      const bf16* h = hidden + i * H + f;
      bf16 *g = ga + i * F + f, *out = gh + i * H + f;
      if (m == V) {
        x = widen(h), y = widen(g);
        if (gated) u = widen(h + F);
      } else {
        for (i64 t = 0; t < m; t++) {
          x[t] = value(h[t]), y[t] = value(g[t]);
          if (gated) u[t] = value(h[F + t]);
        }
      }
      vec a = activate(act, x), v = a * u, scaled = y * w;
      vec gate = scaled * u * slope(act, x), rest = scaled * a;
      product += y * v;
      if (m == V) {
        narrow(g, v * w), narrow(out, gate);
        if (gated) narrow(out + F, rest);
      } else {
        for (i64 t = 0; t < m; t++) {
          round_to(g[t], v[t] * w), round_to(out[t], gate[t]);
          if (gated) round_to(out[F + t], rest[t]);
        }
      }
    }
    inner[i] = sum(product);
  }
}

// Activated values [n, F] of hidden ones [n, H], in bfloat16.
extern "C" void activate_bfloat16(const bf16* hidden, bf16* out, i64 n, i64 F, int act, int gated) {
  const i64 H = gated ? 2 * F : F;
#pragma omp parallel for schedule(static) if (n * F > 1 << 15)
  for (i64 i = 0; i < n; i++)
    for (i64 f = 0; f < F; f += V) {
      const i64 m = std::min<i64>(V, F - f);
      const bf16* h = hidden + i * H + f;
      bf16* y = out + i * F + f;
      vec x = {}, u = splat(1.0f);
      if (m == V) {
        x = widen(h);
        if (gated) u = widen(h + F);
        narrow(y, activate(act, x) * u);
      } else {
        for (i64 t = 0; t < m; t++) x[t] = value(h[t]), u[t] = gated ? value(h[F + t]) : 1.0f;
        vec v = activate(act, x) * u;
        for (i64 t = 0; t < m; t++) round_to(y[t], v[t]);
      }
    }
}
