// A learner block after its convolution: pooling, batch normalisation and ReLU, see learner.py.

#pragma once

#include <algorithm>
#include <cmath>
#include "vectors.h"

namespace {

constexpr int C = 32;  // filters of the learner
constexpr int VECTORS = C / LANES;
constexpr int PAIR = 2 * LANES;  // channels whose sums add_times_gradient keeps in registers
static_assert(C % PAIR == 0, "channels go by two vectors");

// Adds to sums [N, C], for each of n pixels and each k < N, x(pixel, k, channel) times the pixel's row of grad [n, C].
template <int N, class X>
INLINE void add_times_gradient(X x, const float* grad, len n, float* sums) {
  ROLLED for (int from = 0; from < C; from += PAIR) {
    vec acc[N][2];
    float* to = sums + from;
    UNROLL for (int k = 0; k < N; k++)
      UNROLL for (int v = 0; v < 2; v++) acc[k][v] = load(to + k * C + v * LANES);
    ROLLED for (len q = 0; q < n; q++) {
      const vec left = load(grad + q * C + from), right = load(grad + q * C + from + LANES);
      UNROLL for (int k = 0; k < N; k++) {
        acc[k][0] += x(q, k, from) * left;
        acc[k][1] += x(q, k, from + LANES) * right;
      }
    }
    UNROLL for (int k = 0; k < N; k++)
      UNROLL for (int v = 0; v < 2; v++) store(to + k * C + v * LANES, acc[k][v]);
  }
}

struct Shape {
  len images, height, width;
  len rows() const { return height / 2; }  // after pooling
  len columns() const { return width / 2; }
  len count() const { return images * height * width; }
  len pooled() const { return rows() * columns() * C; }
};

// Normalisation is an affine map, and an increasing one commutes with the maximum. Where its scale gamma is negative, the sign
// is -1, and the negated output of the convolution is pooled.
struct Signs {
  float of[C];
  explicit Signs(const float* gamma = nullptr) {
    for (int c = 0; c < C; c++) of[c] = gamma && gamma[c] < 0 ? -1.0f : 1.0f;
  }
};

struct Affine {  // the map from each pooling window's maximum to the ReLU's input
  float scale[C], shift[C];
  vec operator()(vec y, int channel) const { return y * load(scale + channel) + load(shift + channel); }
};

// Of a pooling window: the position of its maximum, 0 to 3, or CLOSED where the ReLU lets nothing through. A kernel finds the
// switches or, FROZEN, obeys those that it is given.
constexpr int CLOSED = 4;

template <bool FROZEN>  // the output of a window, from its maximum's; switches may be null if they are not wanted
INLINE void switch_on(vec y, uint8_t* switches, ivec at, float* out) {
  if (!FROZEN && switches) narrowed(switches, y <= 0 ? ivec{} + CLOSED : at);
  store(out, FROZEN ? keep(at != CLOSED, y) : relu(y));
}

INLINE Affine only_bias(const float* bias) {
  Affine affine;
  for (int c = 0; c < C; c++) affine.scale[c] = 1, affine.shift[c] = bias[c];
  return affine;
}

struct Norm {  // normalisation by the batch's statistics
  double mean[C], invstd[C], slope[C];
  Signs signs;
  Affine affine;
  template <class M>
  Norm(const M* means, const float* var, const float* gamma, const float* beta, float eps) : signs(gamma) {
    for (int c = 0; c < C; c++) {
      mean[c] = means[c];
      invstd[c] = 1 / std::sqrt(double(var[c]) + eps);
      slope[c] = gamma[c] * invstd[c];
      affine.scale[c] = float(slope[c]) * signs.of[c];
      affine.shift[c] = float(beta[c] - mean[c] * slope[c]);
    }
  }
};

// Mean and variance of channel c from the sum and the sum of squares of the convolution's outputs.
INLINE void statistics(int c, double sum, double square, len count, double* exact, float* mean, float* var) {
  exact[c] = sum / count;
  mean[c] = float(exact[c]);
  var[c] = float(std::max(square / count - exact[c] * exact[c], 0.0));
}

// The gradient through the batch statistics: k0 + k1 * y for each output y of the convolution.
struct StatsGradient {
  double k0[C], k1[C];
  StatsGradient(const Norm& norm, const double* sums, len count, float* grad_gamma, float* grad_beta) {
    for (int c = 0; c < C; c++) {
      const double beta = sums[c], of_gamma = norm.invstd[c] * (sums[C + c] - norm.mean[c] * beta);
      k1[c] = -norm.slope[c] * norm.invstd[c] * of_gamma / count;
      k0[c] = -norm.slope[c] * beta / count - norm.mean[c] * k1[c];
      grad_gamma[c] = float(of_gamma);
      grad_beta[c] = float(beta);
    }
  }
};

template <bool FROZEN>
void pool_image(const float* y, const Signs& signs, float* pooled, uint8_t* switches, const Shape& s) {
  for (len r = 0; r < s.rows(); r++)
    for (len q = 0; q < s.columns(); q++)
      for (int v = 0; v < C; v += LANES) {
        const float* p = y + (2 * r * s.width + 2 * q) * C + v;
        const len to = (r * s.columns() + q) * C + v;
        ivec at = FROZEN ? widened(switches + to) : ivec{};
        const vec sign = load(signs.of + v), right = sign * load(p + C), below = sign * load(p + s.width * C);
        const vec best = maximum<FROZEN>(sign * load(p), right, below, sign * load(p + (s.width + 1) * C), at);
        store(pooled + to, best);
        if (!FROZEN && switches) narrowed(switches + to, at);
      }
}

// Sum and sum of squares of each channel. For each pair of rows, the squared deviations from its mean are summed in float, and
// mean^2 * n is added in double: a float sum of the squares themselves would lose digits.
void statistics_of_image(const float* y, const Shape& s, double* sums) {
  std::memset(sums, 0, 2 * C * sizeof(double));
  for (len r = 0; r < s.height; r += 2) {
    const float* p = y + r * s.width * C;
    const len n = (r + 1 < s.height ? 2 : 1) * s.width;
    vec mean[VECTORS] = {}, square[VECTORS] = {};
    for (len k = 0; k < n; k++)
      UNROLL for (int v = 0; v < VECTORS; v++) mean[v] += load(p + k * C + v * LANES);
    UNROLL for (int v = 0; v < VECTORS; v++) mean[v] = mean[v] / float(n);
    for (len k = 0; k < n; k++)
      UNROLL for (int v = 0; v < VECTORS; v++) {
        const vec d = load(p + k * C + v * LANES) - mean[v];
        square[v] += d * d;
      }
    for (int c = 0; c < C; c++) {
      const double m = mean[c / LANES][c % LANES];
      sums[c] += m * n;
      sums[C + c] += square[c / LANES][c % LANES] + m * m * n;
    }
  }
}

template <bool FROZEN>
void affine_relu_image(const float* pooled, float* out, const Affine& affine, uint8_t* switches, len size) {
  for (len k = 0; k < size; k += C)
    UNROLL for (int v = 0; v < C; v += LANES) {
      const len at = k + v;
      switch_on<FROZEN>(affine(load(pooled + at), v), switches ? switches + at : nullptr,
                        switches ? widened(switches + at) : ivec{}, out + at);
    }
}

template <bool FROZEN = false>
void block_forward(const float* y, const float* gamma, const float* beta, float eps, float* pooled, uint8_t* switches, float* out,
                   float* mean, float* var, len images, len height, len width, len threads) {
  const Shape s{images, height, width};
  const Signs signs(gamma);
  std::vector<double> parts(s.images * 2 * C);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    const float* of_image = y + b * s.height * s.width * C;
    statistics_of_image(of_image, s, &parts[b * 2 * C]);
    pool_image<FROZEN>(of_image, signs, pooled + b * s.pooled(), switches + b * s.pooled(), s);
  }
  double sums[2 * C], exact[C];
  total(parts, s.images, 2 * C, sums);
  for (int c = 0; c < C; c++) statistics(c, sums[c], sums[C + c], s.count(), exact, mean, var);
  const Norm norm(exact, var, gamma, beta, eps);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    const len at = b * s.pooled();
    affine_relu_image<FROZEN>(pooled + at, out + at, norm.affine, switches + at, s.pooled());
  }
}

// Eval mode: the ReLU of each window's maximum plus the bias.
void block_eval(const float* y, const float* bias, float* out, len images, len height, len width, len threads) {
  const Shape s{images, height, width};
  const Affine affine = only_bias(bias);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    float* of_image = out + b * s.pooled();
    pool_image<false>(y + b * s.height * s.width * C, Signs(), of_image, nullptr, s);
    affine_relu_image<false>(of_image, of_image, affine, nullptr, s.pooled());
  }
}

// Sums over one image of the gradient at the ReLU's input, and of this gradient times the maximum.
void gradient_sums_of_image(const float* grad, const float* pooled, const uint8_t* switches, const Shape& s, double* sums) {
  std::memset(sums, 0, 2 * C * sizeof(double));
  for (len r = 0; r < s.rows(); r++) {
    vec plain[VECTORS] = {}, product[VECTORS] = {};
    const len start = r * s.columns() * C;
    for (len k = start; k < start + s.columns() * C; k += C)
      UNROLL for (int v = 0; v < VECTORS; v++) {
        const len at = k + v * LANES;
        const vec g = keep(widened(switches + at) != CLOSED, load(grad + at));
        plain[v] += g;
        product[v] += g * load(pooled + at);
      }
    for (int c = 0; c < C; c++) {
      sums[c] += plain[c / LANES][c % LANES];
      sums[C + c] += product[c / LANES][c % LANES];
    }
  }
}

// Overwrites y [B, H, W, C], the convolution's output, with its gradient.
void block_backward(const float* grad, const float* pooled, const uint8_t* switches, float* y, const float* gamma, const float* beta,
                    const float* mean, const float* var, float eps, float* grad_gamma, float* grad_beta, len images,
                    len height, len width, len threads) {
  const Shape s{images, height, width};
  std::vector<double> parts(s.images * 2 * C);
  const Norm norm(mean, var, gamma, beta, eps);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    const len at = b * s.pooled();
    gradient_sums_of_image(grad + at, pooled + at, switches + at, s, &parts[b * 2 * C]);
  }
  double sums[2 * C];
  total(parts, s.images, 2 * C, sums);
  for (int c = 0; c < C; c++) sums[C + c] *= norm.signs.of[c];
  const StatsGradient stats_grad(norm, sums, s.count(), grad_gamma, grad_beta);
  float slope[C], k0[C], k1[C];
  for (int c = 0; c < C; c++) slope[c] = float(norm.slope[c]), k0[c] = float(stats_grad.k0[c]), k1[c] = float(stats_grad.k1[c]);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++)
    for (len r = 0; r < s.height; r++)
      for (len q = 0; q < s.width; q += 2)
        UNROLL for (int v = 0; v < C; v += LANES) {
          vec g = {};
          ivec at = {};
          if (r / 2 < s.rows() && q / 2 < s.columns()) {
            const len from = b * s.pooled() + (r / 2 * s.columns() + q / 2) * C + v;
            g = load(grad + from) * load(slope + v);
            at = widened(switches + from);
          }
          const int left = int(r % 2) * 2;
          float* p = y + ((b * s.height + r) * s.width + q) * C + v;
          store(p, load(k0 + v) + load(k1 + v) * load(p) + keep(at == left, g));
          if (q + 1 < s.width) store(p + C, load(k0 + v) + load(k1 + v) * load(p + C) + keep(at == left + 1, g));
        }
}

}  // namespace
