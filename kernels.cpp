// The hot loops of an episode on a CPU, for block.py and metalearner.py, which hold the same arithmetic in PyTorch.
//
// Tensors are dense, images and activations channels last: [images, height, width, channels]. T is float or bfloat16 (as bits);
// sums are float over a few rows and double beyond, always in the same order, so the number of threads changes no bit.
// Compiled and loaded by native.py, against nothing but the compiler's OpenMP.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(16), aligned(1), may_alias));
typedef int64_t len;

constexpr int LANES = 16;
constexpr int C = 32;  // filters of the learner
constexpr int HALVES = C / LANES;
constexpr int TAPS = 27;  // 3 x 3 pixels of 3 colours under a filter of the first block

#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1")  // where the compiler, unrolling, would run out of registers
#define INLINE inline __attribute__((always_inline))

INLINE ivec bits(vec x) { ivec b; memcpy(&b, &x, sizeof b); return b; }
INLINE vec floats(ivec b) { vec x; memcpy(&x, &b, sizeof x); return x; }
INLINE vec all(float x) { return x - vec{}; }
INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
#ifdef __AVX512F__  // what the compiler makes of __builtin_convertvector goes number by number
INLINE ivec widened(const uint8_t* p) { return ivec(_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128((const __m128i*)p))); }
INLINE ivec widened(const uint16_t* p) { return ivec(_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i*)p))); }
INLINE void narrowed(uint8_t* p, ivec x) { _mm512_mask_cvtepi32_storeu_epi8(p, -1, __m512i(x)); }
INLINE void narrowed(uint16_t* p, ivec x) { _mm512_mask_cvtepi32_storeu_epi16(p, -1, __m512i(x)); }
#else
INLINE ivec widened(const uint8_t* p) { return __builtin_convertvector(*reinterpret_cast<const byte_vec*>(p), ivec); }
INLINE ivec widened(const uint16_t* p) { return __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), ivec); }
INLINE void narrowed(uint8_t* p, ivec x) { *reinterpret_cast<byte_vec*>(p) = __builtin_convertvector(x, byte_vec); }
INLINE void narrowed(uint16_t* p, ivec x) { *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(x, half_vec); }
#endif
INLINE vec load(const uint16_t* p) { return floats(widened(p) << 16); }
INLINE void store(uint16_t* p, vec x) {  // to nearest, ties to even; NaN stays NaN
  const ivec b = bits(x), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  narrowed(p, (x != x ? (ivec{} + 0x7fc0) : rounded) & 0xffff);
}
INLINE float number(float x) { return x; }
INLINE float number(uint16_t x) { uint32_t b = uint32_t(x) << 16; float f; memcpy(&f, &b, sizeof f); return f; }
INLINE vec keep(ivec mask, vec x) { return floats(mask & bits(x)); }
INLINE vec relu(vec x) { return x < 0 ? vec{} : x; }  // NaN stays NaN
INLINE void larger(vec& best, ivec& at, vec x, int position) {  // the first of equals wins, NaN over all, as in PyTorch
  const ivec won = (x > best) | (x != x);
  best = won ? x : best;
  at = won ? (ivec{} + position) : at;
}
INLINE double sum(vec x) {
  double s = 0;
  for (int k = 0; k < LANES; k++) s += x[k];
  return s;
}

// Relative errors are below 1e-6. The AVX-512 instructions below halve their time; other processors do without.
INLINE vec at_least(vec x, float limit) {  // NaN stays NaN, here and below
#ifdef __AVX512F__
  return vec(_mm512_max_ps(__m512(all(limit)), __m512(x)));
#else
  return x < limit ? all(limit) : x;
#endif
}
INLINE vec at_most(vec x, float limit) {
#ifdef __AVX512F__
  return vec(_mm512_min_ps(__m512(all(limit)), __m512(x)));
#else
  return x > limit ? all(limit) : x;
#endif
}
INLINE vec times_power_of_two(vec x, vec n) {  // n whole, between -126 and 127
#ifdef __AVX512F__
  return vec(_mm512_scalef_ps(__m512(x), __m512(n)));
#else
  return x * floats((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}
INLINE vec reciprocal(vec x) {
#ifdef __AVX512F__  // an estimate and one step of Newton's
  const vec y = vec(_mm512_maskz_rcp14_ps(__mmask16(-1), __m512(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}
INLINE vec exponential(vec x) {  // |x| at most 87
  const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  const vec r = x - n * 0.693147180560f;
  vec p = all(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  return times_power_of_two(p * r * r + r + 1.0f, n);
}
INLINE vec sigmoid(vec x) { return reciprocal(1.0f + exponential(-at_most(at_least(x, -87.0f), 87.0f))); }
INLINE vec hyperbolic_tangent(vec x) {  // a quotient of polynomials; beyond 7.9 it is 1 in float
  x = at_most(at_least(x, -7.9f), 7.9f);
  const vec square = x * x;
  vec p = all(-2.76076847742355e-16f);
  p = p * square + 2.00018790482477e-13f;
  p = p * square - 8.60467152213735e-11f;
  p = p * square + 5.12229709037114e-08f;
  p = p * square + 1.48572235717979e-05f;
  p = p * square + 6.37261928875436e-04f;
  p = p * square + 4.89352455891786e-03f;
  vec q = all(1.19825839466702e-06f);
  q = q * square + 1.18534705686654e-04f;
  q = q * square + 2.26843463243900e-03f;
  q = q * square + 4.89352518554385e-03f;
  return x * p * reciprocal(q);
}
INLINE vec gate(vec x) { return 0.5f + 0.5f * hyperbolic_tangent(0.5f * x); }  // sigmoid, to 1e-7 of its range, not of itself

// ---- Sums of products ----

constexpr int ROWS = 4, COLUMNS = 6;  // of them are held in registers

// sums [rows, columns, LANES] += products of the rows of a [rows, width] with those of z [columns, width], LANES at a time.
// Where a is z, what lies below the diagonal is left out, but for the blocks that the diagonal cuts.
INLINE void add_products(const float* a, int rows, const float* z, int columns, int width, float* sums) {
  for (int r = 0; r < rows; r += ROWS)
    for (int k = a == z ? r / COLUMNS * COLUMNS : 0; k < columns; k += COLUMNS) {
      vec s[ROWS][COLUMNS];
      UNROLL for (int p = 0; p < ROWS; p++)
        UNROLL for (int q = 0; q < COLUMNS; q++) s[p][q] = load(sums + ((r + p) * columns + k + q) * LANES);
      for (int at = 0; at < width; at += LANES) {
        vec left[ROWS];
        UNROLL for (int p = 0; p < ROWS; p++) left[p] = load(a + (r + p) * width + at);
        UNROLL for (int q = 0; q < COLUMNS; q++) {
          const vec right = load(z + (k + q) * width + at);
          UNROLL for (int p = 0; p < ROWS; p++) s[p][q] += left[p] * right;
        }
      }
      UNROLL for (int p = 0; p < ROWS; p++)
        UNROLL for (int q = 0; q < COLUMNS; q++) store(sums + ((r + p) * columns + k + q) * LANES, s[p][q]);
    }
}

// ---- Blocks of the learner ----

struct Shape {
  len images, height, width;
  len rows() const { return height / 2; }  // after pooling
  len columns() const { return width / 2; }
  len count() const { return images * height * width; }
  len pooled() const { return rows() * columns() * C; }
};

struct Norm {  // batch statistics and what follows from them
  double mean[C], invstd[C];
  float scale[C], shift[C];
  void set(const float* gamma, const float* beta, const float* var, float eps) {
    for (int c = 0; c < C; c++) {
      invstd[c] = 1 / std::sqrt(double(var[c]) + eps);
      scale[c] = float(gamma[c] * invstd[c]);
      shift[c] = beta ? float(beta[c] - mean[c] * gamma[c] * invstd[c]) : 0;
    }
  }
  static Norm only_bias(const float* bias) {
    Norm norm;
    for (int c = 0; c < C; c++) norm.scale[c] = 1, norm.shift[c] = bias[c];
    return norm;
  }
};

// What passes through the batch statistics adds k0 + k1 * y to the gradient of each output y of the convolution.
struct Through {
  double k0[C], k1[C];
  void set(const Norm& norm, const float* gamma, const double* sums, len count, float* grad_gamma, float* grad_beta) {
    for (int c = 0; c < C; c++) {
      const double beta = sums[c], of_gamma = norm.invstd[c] * (sums[C + c] - norm.mean[c] * beta);
      const double scale = gamma[c] * norm.invstd[c];
      k1[c] = -scale * norm.invstd[c] * of_gamma / count;
      k0[c] = -scale * beta / count - norm.mean[c] * k1[c];
      grad_gamma[c] = float(of_gamma);
      grad_beta[c] = float(beta);
    }
  }
};

// Adds up what each image found, in the order of the images.
void total(const std::vector<double>& parts, len images, len size, double* result) {
  std::memset(result, 0, size * sizeof(double));
  for (len b = 0; b < images; b++)
    for (len k = 0; k < size; k++) result[k] += parts[b * size + k];
}

template <class T>
void pool_image(const T* y, T* pooled, uint8_t* where, const Shape& s) {
  for (len r = 0; r < s.rows(); r++)
    for (len q = 0; q < s.columns(); q++)
      for (int v = 0; v < C; v += LANES) {
        const T* p = y + (2 * r * s.width + 2 * q) * C + v;
        vec best = load(p);
        ivec at = ivec{};
        larger(best, at, load(p + C), 1);
        larger(best, at, load(p + s.width * C), 2);
        larger(best, at, load(p + (s.width + 1) * C), 3);
        const len to = (r * s.columns() + q) * C + v;
        store(pooled + to, best);
        if (where) narrowed(where + to, at);
      }
}

// Sum, and sum of squares (by way of the deviations from the mean of a pair of rows, whose squares lose no digits).
template <class T>
void statistics_of_image(const T* y, const Shape& s, double* sums) {
  std::memset(sums, 0, 2 * C * sizeof(double));
  for (len r = 0; r < s.height; r += 2) {
    const T* p = y + r * s.width * C;
    const len n = (r + 1 < s.height ? 2 : 1) * s.width;
    vec mean[HALVES] = {}, square[HALVES] = {};
    for (len k = 0; k < n; k++)
      UNROLL for (int v = 0; v < HALVES; v++) mean[v] += load(p + k * C + v * LANES);
    UNROLL for (int v = 0; v < HALVES; v++) mean[v] = mean[v] / float(n);
    for (len k = 0; k < n; k++)
      UNROLL for (int v = 0; v < HALVES; v++) {
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

INLINE vec affine(vec y, const Norm& norm, int channel) { return y * load(norm.scale + channel) + load(norm.shift + channel); }
INLINE ivec positive(vec y, const Norm& norm, int channel) { return ~(affine(y, norm, channel) <= 0); }

template <class T>
void affine_relu_image(const T* pooled, T* out, const Norm& norm, len size) {
  for (len k = 0; k < size; k += C)
    UNROLL for (int v = 0; v < C; v += LANES) store(out + k + v, relu(affine(load(pooled + k + v), norm, v)));
}

template <class T>
void block_forward(const T* y, const float* gamma, const float* beta, float eps, T* pooled, uint8_t* where, T* out,
                   float* mean, float* var, const Shape& s, int threads) {
  std::vector<double> parts(s.images * 2 * C);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    const T* of_image = y + b * s.height * s.width * C;
    statistics_of_image(of_image, s, &parts[b * 2 * C]);
    pool_image(of_image, pooled + b * s.pooled(), where + b * s.pooled(), s);
  }
  double sums[2 * C];
  total(parts, s.images, 2 * C, sums);
  Norm norm;
  for (int c = 0; c < C; c++) {
    norm.mean[c] = sums[c] / s.count();
    const double v = sums[C + c] / s.count() - norm.mean[c] * norm.mean[c];
    mean[c] = float(norm.mean[c]);
    var[c] = float(v < 0 ? 0 : v);
  }
  norm.set(gamma, beta, var, eps);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) affine_relu_image(pooled + b * s.pooled(), out + b * s.pooled(), norm, s.pooled());
}

// In eval mode: the maxima, plus bias, through the ReLU.
template <class T>
void block_eval(const T* y, const float* bias, T* out, const Shape& s, int threads) {
  const Norm norm = Norm::only_bias(bias);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++) {
    pool_image(y + b * s.height * s.width * C, out + b * s.pooled(), nullptr, s);
    affine_relu_image(out + b * s.pooled(), out + b * s.pooled(), norm, s.pooled());
  }
}

// Sums over an image's positions of the gradient behind the ReLU, and of its product with the maxima.
template <class T>
void gradient_sums_of_image(const T* grad, const T* pooled, const Norm& norm, const Shape& s, double* sums) {
  std::memset(sums, 0, 2 * C * sizeof(double));
  for (len r = 0; r < s.rows(); r++) {
    vec plain[HALVES] = {}, product[HALVES] = {};
    const len start = r * s.columns() * C;
    for (len k = start; k < start + s.columns() * C; k += C)
      UNROLL for (int v = 0; v < HALVES; v++) {
        const vec y = load(pooled + k + v * LANES);
        const vec g = keep(positive(y, norm, v * LANES), load(grad + k + v * LANES));
        plain[v] += g;
        product[v] += g * y;
      }
    for (int c = 0; c < C; c++) {
      sums[c] += plain[c / LANES][c % LANES];
      sums[C + c] += product[c / LANES][c % LANES];
    }
  }
}

// y [B, H, W, C] turns into its gradient.
template <class T>
void block_backward(const T* grad, const T* pooled, const uint8_t* where, T* y, const float* gamma, const float* beta,
                    const float* mean, const float* var, float eps, float* grad_gamma, float* grad_beta, const Shape& s,
                    int threads) {
  std::vector<double> parts(s.images * 2 * C);
  Norm norm;
  for (int c = 0; c < C; c++) norm.mean[c] = mean[c];
  norm.set(gamma, beta, var, eps);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++)
    gradient_sums_of_image(grad + b * s.pooled(), pooled + b * s.pooled(), norm, s, &parts[b * 2 * C]);
  double sums[2 * C];
  total(parts, s.images, 2 * C, sums);
  Through through;
  through.set(norm, gamma, sums, s.count(), grad_gamma, grad_beta);
  float k0[C], k1[C];
  for (int c = 0; c < C; c++) k0[c] = float(through.k0[c]), k1[c] = float(through.k1[c]);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (len b = 0; b < s.images; b++)
    for (len r = 0; r < s.height; r++)
      for (len q = 0; q < s.width; q += 2)
        UNROLL for (int v = 0; v < C; v += LANES) {
          vec g = {};
          ivec at = {};
          if (r / 2 < s.rows() && q / 2 < s.columns()) {
            const len from = b * s.pooled() + (r / 2 * s.columns() + q / 2) * C + v;
            g = keep(positive(load(pooled + from), norm, v), load(grad + from)) * load(norm.scale + v);
            at = widened(where + from);
          }
          const int left = int(r % 2) * 2;
          T* p = y + ((b * s.height + r) * s.width + q) * C + v;
          store(p, load(k0 + v) + load(k1 + v) * load(p) + keep(at == left, g));
          if (q + 1 < s.width) store(p + C, load(k0 + v) + load(k1 + v) * load(p + C) + keep(at == left + 1, g));
        }
}

// ---- The first block, whose convolution is not stored ----

struct Padded {  // an image [height, width, 3] with a border of zeros
  len stride;
  std::vector<float> pixels;
  explicit Padded(const Shape& s) : stride((s.width + 2) * 3), pixels((s.height + 2) * stride + LANES) {}
  template <class T>
  void copy(const T* x, const Shape& s) {
    for (len r = 0; r < s.height; r++)
      for (len k = 0; k < s.width * 3; k++) pixels[(r + 1) * stride + 3 + k] = number(x[r * s.width * 3 + k]);
  }
};

// Filters [C, 3 colours, 3, 3] in the order in which an image's pixels lie: [row, 3 columns x 3 colours, C]
struct Filters {
  float w[TAPS][C];
  static int place(int tap) { return tap % 3 * 9 + tap / 3; }  // of tap (row, column, colour) in (colour, row, column)
  explicit Filters(const float* weight) {
    for (int t = 0; t < TAPS; t++)
      for (int c = 0; c < C; c++) w[t][c] = weight[c * TAPS + place(t)];
  }
};

template <int N, class T>  // N pooled pixels side by side
INLINE void first_pixels(const float* in, len stride, const Filters& filters, const Norm& norm, uint8_t* where, T* out) {
  vec y[2][2 * N][HALVES] = {};
  for (int row = 0; row < 3; row++)
    ROLLED for (int t = 0; t < 9; t++) {
      vec w[HALVES];
      UNROLL for (int v = 0; v < HALVES; v++) w[v] = load(filters.w[row * 9 + t] + v * LANES);
      UNROLL for (int dr = 0; dr < 2; dr++)
        UNROLL for (int dq = 0; dq < 2 * N; dq++) {
          const vec x = all(in[(dr + row) * stride + dq * 3 + t]);
          UNROLL for (int v = 0; v < HALVES; v++) y[dr][dq][v] += x * w[v];
        }
    }
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int v = 0; v < HALVES; v++) {
      vec best = y[0][2 * n][v];
      ivec at = ivec{};
      larger(best, at, y[0][2 * n + 1][v], 1);
      larger(best, at, y[1][2 * n][v], 2);
      larger(best, at, y[1][2 * n + 1][v], 3);
      const len to = n * C + v * LANES;
      if (where) narrowed(where + to, at);
      store(out + to, relu(affine(best, norm, v * LANES)));
    }
}

template <class T>
void first_images(const T* x, const Filters& filters, const Norm& norm, uint8_t* where, T* out, const Shape& s, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Padded padded(s);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      padded.copy(x + b * s.height * s.width * 3, s);
      for (len r = 0; r < s.rows(); r++) {
        const float* in = padded.pixels.data() + 2 * r * padded.stride;
        const len row = b * s.pooled() + r * s.columns() * C;
        len q = 0;
        for (; q + 3 <= s.columns(); q += 3) {
          const len to = row + q * C;
          first_pixels<3>(in + q * 6, padded.stride, filters, norm, where ? where + to : nullptr, out + to);
        }
        for (; q < s.columns(); q++) {
          const len to = row + q * C;
          first_pixels<1>(in + q * 6, padded.stride, filters, norm, where ? where + to : nullptr, out + to);
        }
      }
    }
  }
}

template <class T>
void first_forward(const T* x, const float* weight, const float* gamma, const float* beta, float eps, const double* patches,
                   const double* products, uint8_t* where, T* out, float* mean, float* var, const Shape& s, int threads) {
  Norm norm;
  for (int c = 0; c < C; c++) {
    double m = 0, square = 0;
    for (int j = 0; j < TAPS; j++) {
      double inner = 0;
      for (int k = 0; k < TAPS; k++) inner += products[j * TAPS + k] * weight[c * TAPS + k];
      square += inner * weight[c * TAPS + j];
      m += patches[j] * weight[c * TAPS + j];
    }
    norm.mean[c] = m / s.count();
    const double v = square / s.count() - norm.mean[c] * norm.mean[c];
    mean[c] = float(norm.mean[c]);
    var[c] = float(v < 0 ? 0 : v);
  }
  norm.set(gamma, beta, var, eps);
  first_images(x, Filters(weight), norm, where, out, s, threads);
}

// Sums over an image's maxima of the gradient behind the ReLU, [C], and of its products with the patches, [TAPS, C].
template <class T>
void first_sums_of_image(const Padded& padded, const T* grad, const T* out, const uint8_t* where, const Shape& s, double* result) {
  for (int v = 0; v < C; v += LANES) {
    vec plain = {}, sums[TAPS] = {};
    for (len r = 0; r < s.rows(); r++)
      for (len q = 0; q < s.columns(); q++) {
        const len from = (r * s.columns() + q) * C + v;
        const vec g = keep(~(load(out + from) <= 0), load(grad + from));
        const ivec at = widened(where + from);
        plain += g;
        ROLLED for (int k = 0; k < 4; k++) {
          const vec here = keep(at == k, g);
          const float* top = padded.pixels.data() + (2 * r + k / 2) * padded.stride + (2 * q + k % 2) * 3;
          const float *middle = top + padded.stride, *bottom = middle + padded.stride;
          UNROLL for (int t = 0; t < 9; t++) sums[t] += here * top[t];
          UNROLL for (int t = 0; t < 9; t++) sums[9 + t] += here * middle[t];
          UNROLL for (int t = 0; t < 9; t++) sums[18 + t] += here * bottom[t];
        }
      }
    for (int k = 0; k < LANES; k++) {
      result[v + k] = plain[k];
      for (int t = 0; t < TAPS; t++) result[C + t * C + v + k] = sums[t][k];
    }
  }
}

template <class T>
void first_backward(const T* grad, const T* x, const float* weight, const T* out, const uint8_t* where, const float* gamma,
                    const float* mean, const float* var, float eps, const double* patches, const double* products,
                    float* grad_weight, float* grad_gamma, float* grad_beta, const Shape& s, int threads) {
  constexpr len SIZE = C + TAPS * C;
  std::vector<double> parts(s.images * SIZE);
#pragma omp parallel num_threads(threads)
  {
    Padded padded(s);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      const len at = b * s.pooled();
      padded.copy(x + b * s.height * s.width * 3, s);
      first_sums_of_image(padded, grad + at, out + at, where + at, s, &parts[b * SIZE]);
    }
  }
  double found[SIZE], sums[2 * C];
  total(parts, s.images, SIZE, found);
  const double* at_maxima = found + C;
  for (int c = 0; c < C; c++) {
    sums[c] = found[c];
    sums[C + c] = 0;  // gradient times maximum, which is filter times patch
    for (int t = 0; t < TAPS; t++) sums[C + c] += at_maxima[t * C + c] * weight[c * TAPS + Filters::place(t)];
  }
  Norm norm;
  for (int c = 0; c < C; c++) norm.mean[c] = mean[c];
  norm.set(gamma, nullptr, var, eps);
  Through through;
  through.set(norm, gamma, sums, s.count(), grad_gamma, grad_beta);
  for (int c = 0; c < C; c++)
    for (int t = 0; t < TAPS; t++) {
      const int j = Filters::place(t);
      double inner = 0;
      for (int k = 0; k < TAPS; k++) inner += products[j * TAPS + k] * weight[c * TAPS + k];
      const double direct = at_maxima[t * C + c] * gamma[c] * norm.invstd[c];
      grad_weight[c * TAPS + j] = float(direct + through.k0[c] * patches[j] + through.k1[c] * inner);
    }
}

// Sums and sums of products of the 3x3 patches, [TAPS] and [TAPS, TAPS] in the order (colour, row, column).
template <class T>
void patch_moments(const T* x, double* patches, double* products, const Shape& s, int threads) {
  constexpr int COUNT = 30, SIZE = TAPS * COUNT;  // taps, ones for the sums, zeros up to a multiple of COLUMNS
  const int width = int((2 * s.width + LANES - 1) / LANES * LANES);  // two rows of pixels at a time
  std::vector<double> parts(s.images * SIZE);
#pragma omp parallel num_threads(threads)
  {
    const len stride = s.width + 2, plane = (s.height + 2) * stride;
    std::vector<float> planes(3 * plane), z(COUNT * width), sums(COUNT * COUNT * LANES);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      for (len r = 0; r < s.height; r++)
        for (len q = 0; q < s.width; q++)
          for (int c = 0; c < 3; c++)
            planes[c * plane + (r + 1) * stride + q + 1] = number(x[((b * s.height + r) * s.width + q) * 3 + c]);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (len r = 0; r < s.height; r += 2) {
        const int rows = r + 1 < s.height ? 2 : 1;
        std::fill(z.begin(), z.end(), 0.0f);
        for (int row = 0; row < rows; row++) {
          for (int t = 0; t < TAPS; t++)
            std::memcpy(&z[t * width + row * s.width], &planes[t / 9 * plane + (r + row + t / 3 % 3) * stride + t % 3],
                        s.width * sizeof(float));
          std::fill_n(&z[TAPS * width + row * s.width], s.width, 1.0f);
        }
        add_products(z.data(), TAPS + 1, z.data(), COUNT, width, sums.data());
      }
      for (int k = 0; k < SIZE; k++) parts[b * SIZE + k] = sum(load(&sums[k * LANES]));
    }
  }
  std::vector<double> all_sums(SIZE);
  total(parts, s.images, SIZE, all_sums.data());
  for (int j = 0; j < TAPS; j++) {
    patches[j] = all_sums[j * COUNT + TAPS];
    for (int k = 0; k < TAPS; k++) products[j * TAPS + k] = all_sums[std::min(j, k) * COUNT + std::max(j, k)];
  }
}

// ---- The meta-learner ----

constexpr int TILE = 128;  // coordinates at a time
constexpr int CHUNKS = 16;  // whose sums are kept apart, whatever the number of threads
constexpr int WIDE = 4;  // vectors of a row held in registers

// One step of the LSTM for a tile of coordinates. z [2 + H, TILE]: what it reads; gates come out as [4 H, TILE] in PyTorch's
// order (input, forget, candidate, output).
INLINE void lstm_tile(const float* weight, const float* bias, int H, const float* z, const float* c, float* gates,
                      float* squashed, float* new_c, float* new_h) {
  for (int u = 0; u < H; u++)
    for (int from = 0; from < TILE; from += WIDE * LANES) {
      vec a[4][WIDE];
      UNROLL for (int g = 0; g < 4; g++)
        UNROLL for (int v = 0; v < WIDE; v++) a[g][v] = all(bias[g * H + u]);
      for (int k = 0; k < H + 2; k++) {
        vec in[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) in[v] = load(z + k * TILE + from + v * LANES);
        UNROLL for (int g = 0; g < 4; g++) {
          const vec w = all(weight[(g * H + u) * (H + 2) + k]);
          UNROLL for (int v = 0; v < WIDE; v++) a[g][v] += w * in[v];
        }
      }
      UNROLL for (int v = 0; v < WIDE; v++) {
        const int at = u * TILE + from + v * LANES;
        const vec i = gate(a[0][v]), f = gate(a[1][v]), g = hyperbolic_tangent(a[2][v]), o = gate(a[3][v]);
        const vec cell = f * load(c + at) + i * g, s = hyperbolic_tangent(cell);
        store(gates + at, i);
        store(gates + H * TILE + at, f);
        store(gates + 2 * H * TILE + at, g);
        store(gates + 3 * H * TILE + at, o);
        store(squashed + at, s);
        store(new_c + at, cell);
        store(new_h + at, o * s);
      }
    }
}

INLINE len tiles(len P) { return (P + TILE - 1) / TILE; }

// The LSTM's state h and c, and what it read, x, lie tile by tile: [tiles, H, TILE] and [tiles, 2, TILE]. All else is flat, [P].
struct Tile {  // a stretch of the coordinates
  len start, size;
  Tile(len t, len P) : start(t * TILE), size(std::min<len>(TILE, P - t * TILE)) {}
  void get(float* to, const float* from) const {
    std::memcpy(to, from + start, size * sizeof(float));
    std::memset(to + size, 0, (TILE - size) * sizeof(float));
  }
  void put(float* to, const float* from) const { std::memcpy(to + start, from, size * sizeof(float)); }
};


INLINE void prep(float x, float* first, float* second) {
  const float size = std::fabs(x);
  const bool large = size >= 4.539992976e-05f;  // e^-10
  *first = large ? std::log(size + 1e-8f) / 10 : -1;
  *second = large ? (x > 0 ? 1.0f : -1.0f) : 22026.465794806718f * x;
  if (x != x) *first = *second = x;
}

void meta_step(const float* weight, const float* bias, const float* wf, const float* bf, const float* wi, const float* bi,
               const float* grad, const float* h, const float* c, const float* f, const float* i, const float* theta, float* x,
               float* new_h, float* new_c, float* new_f, float* new_i, float* new_theta, int H, len P, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> z((H + 2) * TILE), gates(4 * H * TILE), squashed(H * TILE), g(TILE), fo(TILE), io(TILE), th(TILE);
#pragma omp for schedule(static)
    for (len t = 0; t < tiles(P); t++) {
      const Tile tile(t, P);
      const len state = t * H * TILE;
      tile.get(g.data(), grad);
      for (int k = 0; k < TILE; k++) prep(g[k], &z[k], &z[TILE + k]);
      std::copy_n(z.data(), 2 * TILE, x + t * 2 * TILE);
      std::copy_n(h + state, H * TILE, &z[2 * TILE]);
      lstm_tile(weight, bias, H, z.data(), c + state, gates.data(), squashed.data(), new_c + state, new_h + state);
      tile.get(fo.data(), f);
      tile.get(io.data(), i);
      tile.get(th.data(), theta);
      for (int at = 0; at < TILE; at += LANES) {
        const vec value = load(&th[at]);
        vec forget = value * wf[H] + load(&fo[at]) * wf[H + 1] + bf[0];
        vec input = value * wi[H] + load(&io[at]) * wi[H + 1] + bi[0];
        for (int u = 0; u < H; u++) {
          const vec said = load(new_h + state + u * TILE + at);
          forget += said * wf[u];
          input += said * wi[u];
        }
        store(&fo[at], forget);
        store(&io[at], input);
        store(&th[at], sigmoid(forget) * value - sigmoid(input) * load(&g[at]));
      }
      tile.put(new_f, fo.data());
      tile.put(new_i, io.data());
      tile.put(new_theta, th.data());
    }
  }
}

// Gradient of what the LSTM read of its own last output: [H, TILE] from the gates' gradients [4 H, TILE].
INLINE void back_through_weight(const float* weight, int H, const float* gates, float* grad_h) {
  for (int u = 0; u < H; u += ROWS)
    for (int from = 0; from < TILE; from += WIDE * LANES) {
      const int rows = H - u < ROWS ? H - u : ROWS;
      vec s[ROWS][WIDE] = {};
      for (int r = 0; r < 4 * H; r++) {
        vec g[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) g[v] = load(gates + r * TILE + from + v * LANES);
        UNROLL for (int p = 0; p < ROWS; p++) {
          const vec w = all(weight[r * (H + 2) + 2 + u + (p < rows ? p : 0)]);
          UNROLL for (int v = 0; v < WIDE; v++) s[p][v] += w * g[v];
        }
      }
      for (int p = 0; p < rows; p++)
        UNROLL for (int v = 0; v < WIDE; v++) store(grad_h + (u + p) * TILE + from + v * LANES, s[p][v]);
    }
}

void meta_step_back(const float* weight, const float* bias, const float* wf, const float* wi, const float* grad, const float* x,
                   const float* h, const float* c, const float* f, const float* i, const float* theta, const float* new_f,
                   const float* new_i, const float* grad_new_h, const float* grad_new_c, const float* grad_new_f,
                   const float* grad_new_i, const float* grad_new_theta, float* grad_weight, float* grad_bias, float* grad_wf,
                   float* grad_bf, float* grad_wi, float* grad_bi, float* grad_h, float* grad_c, float* grad_f, float* grad_i,
                   float* grad_theta, int H, len P, int threads) {
  const int columns = (H + 3 + COLUMNS - 1) / COLUMNS * COLUMNS;  // z, ones for the bias, zeros
  const int cells = H + 3, size = 4 * H * columns, all_sizes = size + 2 * cells;
  std::vector<double> parts(CHUNKS * all_sizes);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> z(columns * TILE), gates(4 * H * TILE), squashed(H * TILE), out_c(H * TILE), out_h(H * TILE);
    std::vector<float> sums(size * LANES), f_sums(cells * LANES), i_sums(cells * LANES);
    std::vector<float> g(TILE), th(TILE), fo(TILE), io(TILE), nf(TILE), ni(TILE), df(TILE), di(TILE), dth(TILE);
    std::fill_n(&z[(H + 2) * TILE], TILE, 1.0f);
#pragma omp for schedule(static)
    for (len chunk = 0; chunk < CHUNKS; chunk++) {
      for (auto* part : {&sums, &f_sums, &i_sums}) std::fill(part->begin(), part->end(), 0.0f);
      for (len t = tiles(P) * chunk / CHUNKS; t < tiles(P) * (chunk + 1) / CHUNKS; t++) {
        const Tile tile(t, P);
        const len state = t * H * TILE;
        const float *cell = c + state, *to_h = grad_new_h + state, *to_c = grad_new_c + state;
        std::copy_n(x + t * 2 * TILE, 2 * TILE, z.data());
        std::copy_n(h + state, H * TILE, &z[2 * TILE]);
        lstm_tile(weight, bias, H, z.data(), cell, gates.data(), squashed.data(), out_c.data(), out_h.data());
        tile.get(g.data(), grad);
        tile.get(th.data(), theta);
        tile.get(fo.data(), f);
        tile.get(io.data(), i);
        tile.get(nf.data(), new_f);
        tile.get(ni.data(), new_i);
        tile.get(df.data(), grad_new_f);
        tile.get(di.data(), grad_new_i);
        tile.get(dth.data(), grad_new_theta);
        for (int at = 0; at < TILE; at += LANES) {
          const vec value = load(&th[at]), d = load(&dth[at]);
          const vec forget = sigmoid(load(&nf[at])), input = sigmoid(load(&ni[at]));
          const vec to_f = load(&df[at]) + d * value * forget * (1.0f - forget);
          const vec to_i = load(&di[at]) - d * load(&g[at]) * input * (1.0f - input);
          auto add = [&](int k, vec with_f, vec with_i) {
            float *sf = &f_sums[k * LANES], *si = &i_sums[k * LANES];
            store(sf, load(sf) + to_f * with_f);
            store(si, load(si) + to_i * with_i);
          };
          add(H, value, value);
          add(H + 1, load(&fo[at]), load(&io[at]));
          add(H + 2, all(1), all(1));
          store(&dth[at], d * forget + to_f * wf[H] + to_i * wi[H]);
          store(&df[at], to_f * wf[H + 1]);
          store(&di[at], to_i * wi[H + 1]);
          for (int u = 0; u < H; u++) {
            const int k = u * TILE + at;
            const vec said = load(&out_h[k]), s = load(&squashed[k]), d_h = load(to_h + k) + to_f * wf[u] + to_i * wi[u];
            add(u, said, said);
            float* gate = &gates[k];
            const vec i_u = load(gate), f_u = load(gate + H * TILE), g_u = load(gate + 2 * H * TILE);
            const vec o_u = load(gate + 3 * H * TILE), d_c = load(to_c + k) + d_h * o_u * (1.0f - s * s);
            store(gate, d_c * g_u * i_u * (1.0f - i_u));
            store(gate + H * TILE, d_c * load(cell + k) * f_u * (1.0f - f_u));
            store(gate + 2 * H * TILE, d_c * i_u * (1.0f - g_u * g_u));
            store(gate + 3 * H * TILE, d_h * s * o_u * (1.0f - o_u));
            store(grad_c + state + k, d_c * f_u);
          }
        }
        add_products(gates.data(), 4 * H, z.data(), columns, TILE, sums.data());
        back_through_weight(weight, H, gates.data(), grad_h + state);
        tile.put(grad_f, df.data());
        tile.put(grad_i, di.data());
        tile.put(grad_theta, dth.data());
      }
      double* part = &parts[chunk * all_sizes];
      for (const auto* found : {&sums, &f_sums, &i_sums})
        for (size_t k = 0; k < found->size(); k += LANES) *part++ = sum(load(&(*found)[k]));
    }
  }
  std::vector<double> found(all_sizes);
  total(parts, CHUNKS, all_sizes, found.data());
  for (int r = 0; r < 4 * H; r++) {
    for (int k = 0; k < H + 2; k++) grad_weight[r * (H + 2) + k] = float(found[r * columns + k]);
    grad_bias[r] = float(found[r * columns + H + 2]);
  }
  const double *of_f = &found[size], *of_i = of_f + cells;
  for (int k = 0; k < H + 2; k++) grad_wf[k] = float(of_f[k]), grad_wi[k] = float(of_i[k]);
  *grad_bf = float(of_f[H + 2]);
  *grad_bi = float(of_i[H + 2]);
}

// ---- Augmentation ----

// The triangle filter along one axis, as _weights in augment.py: for each of size results the first pixel and weights from there.
struct Filter {
  int taps;
  std::vector<int> first;
  std::vector<float> weight;  // [taps, size]
  Filter(len start, len extent, len out, len skip, int size) : first(size) {
    const float scale = float(extent) / float(out), reach = std::max(scale, 1.0f);
    taps = int(std::ceil(2 * reach)) + 1;
    weight.assign(taps * size, 0);
    for (int t = 0; t < size; t++) {
      const float centre = (float(t + skip) + 0.5f) * scale;
      const int from = std::clamp<int>(int(std::floor(centre - reach)), 0, std::max<len>(extent - taps, 0));
      float total = 0;
      for (int k = 0; k < taps && from + k < extent; k++) {
        const float w = std::max(0.0f, 1 - std::fabs(float(from + k) + 0.5f - centre) / reach);
        weight[k * size + t] = w;
        total += w;
      }
      for (int k = 0; k < taps; k++) weight[k * size + t] /= total;
      first[t] = int(start) + from;
    }
  }
};

enum Step { BRIGHTNESS, CONTRAST, SATURATION, HUE };
constexpr float GREY[3] = {0.299f, 0.587f, 0.114f};
constexpr float MEAN[3] = {0.485f, 0.456f, 0.406f}, STD[3] = {0.229f, 0.224f, 0.225f};

INLINE vec clamp(vec x, float low, float high) { return at_most(at_least(x, low), high); }
INLINE vec absolute(vec x) { return floats(bits(x) & 0x7fffffff); }
INLINE vec whole(vec x) {  // the largest whole number not above x
  const vec t = __builtin_convertvector(__builtin_convertvector(x, ivec), vec);
  return t > x ? t - 1.0f : t;
}
INLINE vec grey(vec r, vec g, vec b) { return r * GREY[0] + g * GREY[1] + b * GREY[2]; }

INLINE void turn_hue(vec& r, vec& g, vec& b, float turns) {
  const vec high = r > g ? r : g, top = high > b ? high : b, low = r < g ? r : g, bottom = low < b ? low : b;
  const vec chroma = top - bottom, unit = (255.0f / 6) / at_least(chroma, 1e-6f);
  vec hue = r == top ? (g - b) * unit : (g == top ? (b - r) * unit + 85.0f : (r - g) * unit + 170.0f);
  hue = whole(hue) + std::trunc(turns * 255);
  hue = (hue - 255.0f * whole(hue / 255.0f)) * (6.0f / 255);
  r = bottom + chroma * clamp(absolute(hue - 3.0f) - 1.0f, 0, 1);
  g = bottom + chroma * clamp(2.0f - absolute(hue - 2.0f), 0, 1);
  b = bottom + chroma * clamp(2.0f - absolute(hue - 4.0f), 0, 1);
}

// One step of ColorJitter on the planes x [3, plane]; the first pixels of each are the image, the rest fills a vector.
void adjust(float* x, len plane, len pixels, int step, float factor) {
  float *red = x, *green = x + plane, *blue = x + 2 * plane, mean = 0;
  if (step == CONTRAST) {
    double total = 0;
    for (len k = 0; k < pixels; k++) total += red[k] * GREY[0] + green[k] * GREY[1] + blue[k] * GREY[2];
    mean = float(std::floor(total / pixels + 0.5));
  }
  for (len k = 0; k < pixels; k += LANES) {
    vec r = load(red + k), g = load(green + k), b = load(blue + k);
    if (step == HUE) {
      turn_hue(r, g, b, factor);
    } else {
      const vec target = step == BRIGHTNESS ? vec{} : step == CONTRAST ? all(mean) : grey(r, g, b);
      r = clamp(target + factor * (r - target), 0, 255);
      g = clamp(target + factor * (g - target), 0, 255);
      b = clamp(target + factor * (b - target), 0, 255);
    }
    store(red + k, r);
    store(green + k, g);
    store(blue + k, b);
  }
}

// pixels [images, 3, height, width] -> out [images, size, size, 3]; windows [4, images, 2] as augment.Windows, jitter [images, 4]
// and order [images, 4] or none.
void augment_images(const uint8_t* pixels, const len* windows, const uint8_t* flip, const float* jitter, const len* order,
                    float* out, len size, const Shape& s, int threads) {
  const len area = size * size, plane = (area + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(3 * plane), rows, row(size);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      auto window = [&](int what, int axis) { return windows[(what * s.images + b) * 2 + axis]; };
      const Filter down(window(0, 0), window(1, 0), window(2, 0), window(3, 0), int(size));
      const Filter across(window(0, 1), window(1, 1), window(2, 1), window(3, 1), int(size));
      const len left = window(0, 1), width = window(1, 1);
      rows.resize(s.width + across.taps);
      for (len c = 0; c < 3; c++)
        for (len r = 0; r < size; r++) {
          const uint8_t* from = pixels + ((b * 3 + c) * s.height + down.first[r]) * s.width;
          const len taps = std::min<len>(down.taps, s.height - down.first[r]);
          for (len q = left; q < left + width; q++) rows[q] = from[q] * down.weight[r];
          for (len k = 1; k < taps; k++)
            for (len q = left; q < left + width; q++) rows[q] += from[k * s.width + q] * down.weight[k * size + r];
          std::fill(row.begin(), row.end(), 0.0f);
          for (int k = 0; k < across.taps; k++)
            for (len q = 0; q < size; q++) row[q] += across.weight[k * size + q] * rows[across.first[q] + k];
          float* to = &x[c * plane + r * size];
          if (flip[b]) std::reverse_copy(row.begin(), row.end(), to);
          else std::copy(row.begin(), row.end(), to);
        }
      if (jitter)
        for (int k = 0; k < 4; k++) adjust(x.data(), plane, area, int(order[b * 4 + k]), jitter[b * 4 + order[b * 4 + k]]);
      for (int c = 0; c < 3; c++) {
        const float shift = -MEAN[c] / STD[c], scale = 1 / (255 * STD[c]);
        for (len k = 0; k < area; k++) out[(b * area + k) * 3 + c] = shift + x[c * plane + k] * scale;
      }
    }
  }
}

}  // namespace

// ---- What native.py calls, by these names and with _float or _bfloat16 behind those of the blocks ----

#define BLOCKS(T, name)                                                                                                        \
  void block_forward_##name(const T* y, const float* gamma, const float* beta, float eps, T* pooled, uint8_t* where, T* out,   \
                            float* mean, float* var, len images, len height, len width, len threads) {                         \
    block_forward(y, gamma, beta, eps, pooled, where, out, mean, var, Shape{images, height, width}, int(threads));             \
  }                                                                                                                            \
  void block_backward_##name(const T* grad, const T* pooled, const uint8_t* where, T* y, const float* gamma,                   \
                             const float* beta, const float* mean, const float* var, float eps, float* grad_gamma,             \
                             float* grad_beta, len images, len height, len width, len threads) {                               \
    block_backward(grad, pooled, where, y, gamma, beta, mean, var, eps, grad_gamma, grad_beta,                                 \
                   Shape{images, height, width}, int(threads));                                                                \
  }                                                                                                                            \
  void block_eval_##name(const T* y, const float* bias, T* out, len images, len height, len width, len threads) {              \
    block_eval(y, bias, out, Shape{images, height, width}, int(threads));                                                      \
  }                                                                                                                            \
  void first_forward_##name(const T* x, const float* weight, const float* gamma, const float* beta, float eps,                 \
                            const double* patches, const double* products, uint8_t* where, T* out, float* mean,                \
                            float* var, len images, len height, len width, len threads) {                                      \
    first_forward(x, weight, gamma, beta, eps, patches, products, where, out, mean, var, Shape{images, height, width},         \
                  int(threads));                                                                                               \
  }                                                                                                                            \
  void first_backward_##name(const T* grad, const T* x, const float* weight, const T* out, const uint8_t* where,               \
                             const float* gamma, const float* mean, const float* var, float eps, const double* patches,        \
                             const double* products, float* grad_weight, float* grad_gamma, float* grad_beta, len images,      \
                             len height, len width, len threads) {                                                             \
    first_backward(grad, x, weight, out, where, gamma, mean, var, eps, patches, products, grad_weight, grad_gamma,             \
                   grad_beta, Shape{images, height, width}, int(threads));                                                     \
  }                                                                                                                            \
  void first_eval_##name(const T* x, const float* weight, const float* bias, T* out, len images, len height, len width,        \
                         len threads) {                                                                                        \
    first_images(x, Filters(weight), Norm::only_bias(bias), nullptr, out, Shape{images, height, width}, int(threads));         \
  }                                                                                                                            \
  void patch_moments_##name(const T* x, double* patches, double* products, len images, len height, len width, len threads) {   \
    patch_moments(x, patches, products, Shape{images, height, width}, int(threads));                                           \
  }

extern "C" {
BLOCKS(float, float)
BLOCKS(uint16_t, bfloat16)

void meta_forward(const float* weight, const float* bias, const float* wf, const float* bf, const float* wi, const float* bi,
                  const float* grad, const float* h, const float* c, const float* f, const float* i, const float* theta,
                  float* x, float* new_h, float* new_c, float* new_f, float* new_i, float* new_theta, len H, len P,
                  len threads) {
  meta_step(weight, bias, wf, bf, wi, bi, grad, h, c, f, i, theta, x, new_h, new_c, new_f, new_i, new_theta, int(H), P,
            int(threads));
}
void meta_backward(const float* weight, const float* bias, const float* wf, const float* wi, const float* grad, const float* x,
                   const float* h, const float* c, const float* f, const float* i, const float* theta, const float* new_f,
                   const float* new_i, const float* grad_new_h, const float* grad_new_c, const float* grad_new_f,
                   const float* grad_new_i, const float* grad_new_theta, float* grad_weight, float* grad_bias, float* grad_wf,
                   float* grad_bf, float* grad_wi, float* grad_bi, float* grad_h, float* grad_c, float* grad_f, float* grad_i,
                   float* grad_theta, len H, len P, len threads) {
  meta_step_back(weight, bias, wf, wi, grad, x, h, c, f, i, theta, new_f, new_i, grad_new_h, grad_new_c, grad_new_f,
                 grad_new_i, grad_new_theta, grad_weight, grad_bias, grad_wf, grad_bf, grad_wi, grad_bi, grad_h, grad_c,
                 grad_f, grad_i, grad_theta, int(H), P, int(threads));
}
void augment(const uint8_t* pixels, const len* windows, const uint8_t* flip, const float* jitter, const len* order, float* out,
             len size, len images, len height, len width, len threads) {
  augment_images(pixels, windows, flip, jitter, order, out, size, Shape{images, height, width}, int(threads));
}
}
