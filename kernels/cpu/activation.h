// Activations and their slopes; numbered as `elementwise.FUSED` lists them.

typedef int64_t i64;

enum Act { GELU, GELU_TANH, QUICK_GELU, SILU, RELU, RELU2, IDENTITY };

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// erf by a rational function on [-4, 4] (the one of Eigen and XLA); absolute error below 2e-7.
static inline vec erf(vec x) {
  x = vmin(vmax(x, splat(-4.0f)), splat(4.0f));
  vec s = x * x;
  vec p = splat(-2.72614225801306e-10f);
  for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                  -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f})
    p = p * s + c;
  vec q = splat(-1.45660718464996e-05f);
  for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                  -1.42647390514189e-02f})
    q = q * s + c;
  return x * p / q;
}

static inline vec tanh_inner(vec x) { return 0.7978845608f * (x + 0.044715f * x * x * x); }

static inline vec activate(int act, vec x) {
  switch (act) {
    case GELU:
      return 0.5f * x * (1.0f + erf(x * 0.70710678118f));
    case GELU_TANH:
      return x * sigmoid(2.0f * tanh_inner(x));
    case QUICK_GELU:
      return x * sigmoid(1.702f * x);
    case SILU:
      return x * sigmoid(x);
    case RELU:
      return pick(x < 0, splat(0.0f), x);
    case RELU2:
      return pick(x < 0, splat(0.0f), x * x);
    default:
      return x;
  }
}

// The derivative.
static inline vec slope(int act, vec x) {
  switch (act) {
    case GELU: {
      vec density = 0.3989422804f * exp(-0.5f * x * x);
      return 0.5f * (1.0f + erf(x * 0.70710678118f)) + x * density;
    }
    case GELU_TANH: {
      vec s = sigmoid(2.0f * tanh_inner(x));
      return s + 2.0f * x * s * (1.0f - s) * (0.7978845608f + 0.1070322243f * x * x);
    }
    case QUICK_GELU: {
      vec s = sigmoid(1.702f * x);
      return s * (1.0f + 1.702f * x * (1.0f - s));
    }
    case SILU: {
      vec s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case RELU:
      return pick(x > 0, splat(1.0f), x != x ? x : vec{});
    case RELU2:
      return pick(x < 0, vec{}, 2.0f * x);
    default:
      return splat(1.0f);
  }
}
