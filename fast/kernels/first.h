// The first block of the learner, convolution included. The convolution's output, the largest tensor of the network, exists in
// registers only, a few pixels at a time.

#pragma once

#include <algorithm>
#include "blocks.h"

namespace {

constexpr int TAPS = 27;  // 3 x 3 pixels of 3 colours under a filter

struct Padded {  // an image [height, width, 3] with a border of zeros
  len stride;
  std::vector<float> pixels;
  explicit Padded(const Shape& s) : stride((s.width + 2) * 3), pixels((s.height + 2) * stride + LANES) {}
  void copy(const float* x, const Shape& s) {
    for (len r = 0; r < s.height; r++) std::copy_n(x + r * s.width * 3, s.width * 3, &pixels[(r + 1) * stride + 3]);
  }
};

// Filters with their signs, reordered from PyTorch's [C, colour, row, column] to [row, column, colour, C], the order of the
// pixels in memory.
struct Filters {
  float w[TAPS][C];
  static int place(int tap) { return tap % 3 * 9 + tap / 3; }  // from (row, column, colour) to (colour, row, column)
  Filters(const float* weight, const Signs& signs) {
    for (int t = 0; t < TAPS; t++)
      for (int c = 0; c < C; c++) w[t][c] = signs.of[c] * weight[c * TAPS + place(t)];
  }
};

// What first_pixels keeps in registers: the outputs of PIXELS pooled pixels for GROUP vectors of filters.
constexpr int PIXELS = 3, GROUP = REGISTERS == 32 ? 2 : 1;

template <bool FROZEN, int N>  // computes N neighbouring pooled pixels
INLINE void first_pixels(const float* in, len stride, const Filters& filters, const Affine& affine, uint8_t* switches, float* out) {
  ROLLED for (int from = 0; from < C; from += GROUP * LANES) {
    vec y[2][2 * N][GROUP] = {};
    for (int row = 0; row < 3; row++)
      ROLLED for (int t = 0; t < 9; t++) {
        vec w[GROUP];
        UNROLL for (int v = 0; v < GROUP; v++) w[v] = load(filters.w[row * 9 + t] + from + v * LANES);
        UNROLL for (int dr = 0; dr < 2; dr++)
          UNROLL for (int dq = 0; dq < 2 * N; dq++) {
            const vec x = all(in[(dr + row) * stride + dq * 3 + t]);
            UNROLL for (int v = 0; v < GROUP; v++) y[dr][dq][v] += x * w[v];
          }
      }
    UNROLL for (int n = 0; n < N; n++)
      UNROLL for (int v = 0; v < GROUP; v++) {
        const int channel = from + v * LANES, to = n * C + channel;
        ivec at = FROZEN ? widened(switches + to) : ivec{};
        const vec best = maximum<FROZEN>(y[0][2 * n][v], y[0][2 * n + 1][v], y[1][2 * n][v], y[1][2 * n + 1][v], at);
        switch_on<FROZEN>(affine(best, channel), switches ? switches + to : nullptr, at, out + to);
      }
  }
}

template <bool FROZEN>
void first_images(const float* x, const Filters& filters, const Affine& affine, uint8_t* switches, float* out, const Shape& s,
                  len threads) {
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
        for (; q + PIXELS <= s.columns(); q += PIXELS) {
          const len to = row + q * C;
          first_pixels<FROZEN, PIXELS>(in + q * 6, padded.stride, filters, affine, switches ? switches + to : nullptr, out + to);
        }
        for (; q < s.columns(); q++) {
          const len to = row + q * C;
          first_pixels<FROZEN, 1>(in + q * 6, padded.stride, filters, affine, switches ? switches + to : nullptr, out + to);
        }
      }
    }
  }
}

// Sum over all positions of channel c's output times number j of the patch that the filter covers there.
INLINE double output_times_tap(const double* products, const float* weight, int c, int j) {
  double sum = 0;
  for (int k = 0; k < TAPS; k++) sum += products[j * TAPS + k] * weight[c * TAPS + k];
  return sum;
}

template <bool FROZEN = false>
void first_forward(const float* x, const float* weight, const float* gamma, const float* beta, float eps, const double* patches,
                   const double* products, uint8_t* switches, float* out, float* mean, float* var, len images, len height,
                   len width, len threads) {
  const Shape s{images, height, width};
  double exact[C];
  for (int c = 0; c < C; c++) {
    double sum = 0, square = 0;
    for (int j = 0; j < TAPS; j++) {
      square += output_times_tap(products, weight, c, j) * weight[c * TAPS + j];
      sum += patches[j] * weight[c * TAPS + j];
    }
    statistics(c, sum, square, s.count(), exact, mean, var);
  }
  const Norm norm(exact, var, gamma, beta, eps);
  first_images<FROZEN>(x, Filters(weight, norm.signs), norm.affine, switches, out, s, threads);
}

// Eval mode: the ReLU of each window's maximum plus the bias.
void first_eval(const float* x, const float* weight, const float* bias, float* out, len images, len height, len width, len threads) {
  first_images<false>(x, Filters(weight, Signs()), only_bias(bias), nullptr, out, Shape{images, height, width}, threads);
}

// The inputs of a tap at the four pixels of a pooling window, side by side: two of a row, two of the next. The next tap's
// are one number further, the next window's six.
INLINE void quads_of_rows(const float* row, const float* next, len n, float* quads) {
  for (len k = 0; k < n; k++) {
    float* four = quads + 4 * k;
    four[0] = row[k], four[1] = row[k + 3], four[2] = next[k], four[3] = next[k + 3];
  }
}

// The gradient at the ReLU's input for a row of pooling windows, [columns, C]; its sums are added to plain [C].
INLINE void back_through_relu(const float* grad, const uint8_t* switches, len columns, float* back, float* plain) {
  for (int v = 0; v < C; v += LANES) {
    vec sum = load(plain + v);
    for (len k = v; k < columns * C; k += C) {
      const vec g = keep(widened(switches + k) != CLOSED, load(grad + k));
      store(back + k, g);
      sum += g;
    }
    store(plain + v, sum);
  }
}

// Sums over one image of the gradient at the ReLU's input, [C], and of this gradient times the patch under the filter at the
// window's maximum, [TAPS, C].
void first_sums_of_image(const Padded& padded, const float* grad, const uint8_t* switches, const Shape& s, float* back, float* quads,
                         double* result) {
  float sums[C + TAPS * C] = {};
  const len n = 6 * s.columns() + 3;
  for (len r = 0; r < s.rows(); r++) {
    const len from = r * s.columns() * C;
    back_through_relu(grad + from, switches + from, s.columns(), back, sums);
    for (int row = 0; row < 3; row++) {
      const float* in = padded.pixels.data() + (2 * r + row) * padded.stride;
      float* to = sums + C + row * 9 * C;
      quads_of_rows(in, in + padded.stride, n, quads);
      auto at_maxima = [&](const float* quads) {
        return [=](len q, int tap, int c) { return chosen(repeated(quads + (6 * q + tap) * 4), widened(switches + from + q * C + c)); };
      };
      add_times_gradient<5>(at_maxima(quads), back, s.columns(), to);
      add_times_gradient<4>(at_maxima(quads + 5 * 4), back, s.columns(), to + 5 * C);
    }
  }
  std::copy_n(sums, C + TAPS * C, result);
}

void first_backward(const float* grad, const float* x, const float* weight, const uint8_t* switches, const float* gamma,
                    const float* beta, const float* mean, const float* var, float eps, const double* patches,
                    const double* products, float* grad_weight, float* grad_gamma, float* grad_beta, len images, len height,
                    len width, len threads) {
  const Shape s{images, height, width};
  constexpr len SIZE = C + TAPS * C;
  std::vector<double> parts(s.images * SIZE);
#pragma omp parallel num_threads(threads)
  {
    Padded padded(s);
    std::vector<float> back(s.columns() * C), quads((6 * s.columns() + 3) * 4);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      const len at = b * s.pooled();
      padded.copy(x + b * s.height * s.width * 3, s);
      first_sums_of_image(padded, grad + at, switches + at, s, back.data(), quads.data(), &parts[b * SIZE]);
    }
  }
  double totals[SIZE], sums[2 * C];
  total(parts, s.images, SIZE, totals);
  const double* at_maxima = totals + C;
  for (int c = 0; c < C; c++) {
    sums[c] = totals[c];
    sums[C + c] = 0;  // gradient times maximum; the maximum is filter times patch
    for (int t = 0; t < TAPS; t++) sums[C + c] += at_maxima[t * C + c] * weight[c * TAPS + Filters::place(t)];
  }
  const Norm norm(mean, var, gamma, beta, eps);
  const StatsGradient stats_grad(norm, sums, s.count(), grad_gamma, grad_beta);
  for (int c = 0; c < C; c++)
    for (int t = 0; t < TAPS; t++) {
      const int j = Filters::place(t);
      const double direct = at_maxima[t * C + c] * norm.slope[c];
      const double by_mean = stats_grad.k0[c] * patches[j], by_var = stats_grad.k1[c] * output_times_tap(products, weight, c, j);
      grad_weight[c * TAPS + j] = float(direct + by_mean + by_var);
    }
}

// Sum of the 3x3 patches, [TAPS], and of their outer products, [TAPS, TAPS]. Taps are in the order (colour, row, column).
void patch_moments(const float* x, double* patches, double* products, len images, len height, len width, len threads) {
  const Shape s{images, height, width};
  constexpr int COUNT = 30, SIZE = TAPS * COUNT;  // the taps, ones for the plain sums, zeros up to a multiple of COLUMNS
  const int wide = whole_vectors(int(2 * s.width));  // two rows of pixels at a time
  std::vector<double> parts(s.images * SIZE);
#pragma omp parallel num_threads(threads)
  {
    const len stride = s.width + 2, plane = (s.height + 2) * stride;
    std::vector<float> planes(3 * plane), z(COUNT * wide), sums(COUNT * COUNT * LANES);
#pragma omp for schedule(static)
    for (len b = 0; b < s.images; b++) {
      for (len r = 0; r < s.height; r++)
        for (len q = 0; q < s.width; q++)
          for (int c = 0; c < 3; c++)
            planes[c * plane + (r + 1) * stride + q + 1] = x[((b * s.height + r) * s.width + q) * 3 + c];
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (len r = 0; r < s.height; r += 2) {
        const int rows = r + 1 < s.height ? 2 : 1;
        std::fill(z.begin(), z.end(), 0.0f);
        for (int row = 0; row < rows; row++) {
          for (int t = 0; t < TAPS; t++)
            std::memcpy(&z[t * wide + row * s.width], &planes[t / 9 * plane + (r + row + t / 3 % 3) * stride + t % 3],
                        s.width * sizeof(float));
          std::fill_n(&z[TAPS * wide + row * s.width], s.width, 1.0f);
        }
        add_products(z.data(), TAPS + 1, z.data(), COUNT, wide, sums.data());
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

}  // namespace
