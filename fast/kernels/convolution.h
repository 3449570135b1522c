// The learner's convolutions of C channels: 3x3, with a border of zeros, by Winograd's algorithm for tiles of 4x4 outputs
// (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016). A tile's 6x6 inputs and the filter are mapped
// linearly to 36 points each, multiplied point by point, summed over the channels and mapped back,
//   outputs = At ((G w Gt) * (Bt x B)) A,
// which takes 36 multiplications a pair of channels where the definition takes 144.
//
// A point stands for the value of a polynomial: at 0, at +-NEAR, at +-FAR, or its leading coefficient. Lavin & Gray's 1 and 2
// lose twice as much to rounding as sqrt(1/2) and sqrt(2), whose product is 1, too.

#pragma once

#include <algorithm>
#include <memory>
#include "blocks.h"

namespace {

constexpr int OUT = 4, IN = OUT + 2, POINTS = IN * IN;  // edge of a tile's outputs, edge of its inputs and of its points
constexpr int PLANE = C * C;                            // one point of all filters
constexpr int TILES = 18;                               // tiles that are mapped, multiplied and mapped back at a time
constexpr int AT_ONCE = 6;                              // tiles whose sums are held in registers
constexpr float NEAR = 0.70710678f, FAR = 1.41421356f;
static_assert(TILES % AT_ONCE == 0 && C % 6 == 2, "blocks fit");

struct Tiling : Shape {
  len down() const { return (height + OUT - 1) / OUT; }
  len across() const { return (width + OUT - 1) / OUT; }
  len tiles() const { return images * down() * across(); }
  len pixel(len image, len row, len column) const { return ((image * height + row) * width + column) * C; }
};

struct ImageTile {  // its outputs' first pixel
  len image, row, column;
  ImageTile(const Tiling& s, len k)
      : image(k / (s.down() * s.across())), row(k / s.across() % s.down() * OUT), column(k % s.across() * OUT) {}
};

// ---- The maps along one edge ----

// At a number and at its opposite, from a polynomial's even and odd parts.
INLINE void at_both_signs(vec even, vec odd, vec* p) { p[0] = even + odd, p[1] = even - odd; }

INLINE void inputs_to_points(const vec* x, vec* p) {  // Bt
  const vec near_even = x[4] - 2.0f * x[2], near_odd = NEAR * (x[3] - 2.0f * x[1]);
  const vec far_even = x[4] - 0.5f * x[2], far_odd = FAR * (x[3] - 0.5f * x[1]);
  p[0] = x[0] - 2.5f * x[2] + x[4];
  at_both_signs(near_even, near_odd, p + 1);
  at_both_signs(far_even, far_odd, p + 3);
  p[5] = x[1] - 2.5f * x[3] + x[5];
}

INLINE void points_to_outputs(const vec* p, vec* y) {  // At
  const vec near_even = p[1] + p[2], near_odd = NEAR * (p[1] - p[2]);
  const vec far_even = p[3] + p[4], far_odd = FAR * (p[3] - p[4]);
  y[0] = p[0] + near_even + far_even;
  y[1] = near_odd + far_odd;
  y[2] = 0.5f * near_even + 2.0f * far_even;
  y[3] = 0.5f * near_odd + 2.0f * far_odd + p[5];
}

INLINE void gradient_to_points(const vec* y, vec* p) {  // A
  const vec near_even = y[0] + 0.5f * y[2], near_odd = NEAR * (y[1] + 0.5f * y[3]);
  const vec far_even = y[0] + 2.0f * y[2], far_odd = FAR * (y[1] + 2.0f * y[3]);
  p[0] = y[0];
  at_both_signs(near_even, near_odd, p + 1);
  at_both_signs(far_even, far_odd, p + 3);
  p[5] = y[3];
}

INLINE void filter_to_points(const vec* w, vec* p) {  // G
  const vec near_even = -2 / 3.0f * w[0] - 1 / 3.0f * w[2], near_odd = -2 / 3.0f * NEAR * w[1];
  const vec far_even = 1 / 6.0f * w[0] + 1 / 3.0f * w[2], far_odd = 1 / 6.0f * FAR * w[1];
  p[0] = w[0];
  at_both_signs(near_even, near_odd, p + 1);
  at_both_signs(far_even, far_odd, p + 3);
  p[5] = w[2];
}

INLINE void points_to_filter(const vec* p, vec* w) {  // Gt
  const vec near_even = p[1] + p[2], far_even = p[3] + p[4];
  w[0] = p[0] - 2 / 3.0f * near_even + 1 / 6.0f * far_even;
  w[1] = 1 / 6.0f * FAR * (p[3] - p[4]) - 2 / 3.0f * NEAR * (p[1] - p[2]);
  w[2] = 1 / 3.0f * (far_even - near_even) + p[5];
}

// ---- The maps along both edges ----

// Maps the columns of N x N vectors, from(row, column), then the rows, and gives the M x M vectors to to(row, column, vector).
template <int N, int M, class Map, class From, class To>
INLINE void along_both(Map map, From from, To to) {
  vec half[M][N];
  UNROLL for (int j = 0; j < N; j++) {
    vec column[N], mapped[M];
    UNROLL for (int i = 0; i < N; i++) column[i] = from(i, j);
    map(column, mapped);
    UNROLL for (int i = 0; i < M; i++) half[i][j] = mapped[i];
  }
  UNROLL for (int i = 0; i < M; i++) {
    vec mapped[M];
    map(half[i], mapped);
    UNROLL for (int j = 0; j < M; j++) to(i, j, mapped[j]);
  }
}

// N x N pixels of an image, from (row, column) on, at points [POINTS, TILES, C].
template <int N, class Map>
INLINE void pixels_to_points(Map map, const float* x, const Tiling& s, len image, len row, len column, float* points) {
  const float* first = x + s.pixel(image, row, column);
  len stride = s.width * C;
  alignas(64) float copy[N * N * C];  // of pixels that reach beyond the image, where it is zero
  if (row < 0 || column < 0 || row + N > s.height || column + N > s.width) {
    for (len i = 0; i < N; i++)
      for (len j = 0; j < N; j++) {
        const bool inside = row + i >= 0 && row + i < s.height && column + j >= 0 && column + j < s.width;
        for (int c = 0; c < C; c += LANES)
          store(copy + (i * N + j) * C + c, inside ? load(first + i * stride + j * C + c) : vec{});
      }
    first = copy, stride = N * C;
  }
  ROLLED for (int c = 0; c < C; c += LANES)
    along_both<N, IN>(
        map, [&](int i, int j) { return load(first + i * stride + j * C + c); },
        [&](int i, int j, vec p) { store(points + (i * IN + j) * TILES * C + c, p); });
}

// A tile's inputs reach one pixel beyond its outputs on each side.
INLINE void map_inputs(const float* x, const Tiling& s, const ImageTile& tile, float* points) {
  pixels_to_points<IN>(inputs_to_points, x, s, tile.image, tile.row - 1, tile.column - 1, points);
}

INLINE void map_outputs(const float* points, const Tiling& s, const ImageTile& tile, float* y) {
  y += s.pixel(tile.image, tile.row, tile.column);
  const len rows = s.height - tile.row, columns = s.width - tile.column;
  ROLLED for (int c = 0; c < C; c += LANES)
    along_both<IN, OUT>(
        points_to_outputs, [&](int i, int j) { return load(points + (i * IN + j) * TILES * C + c); },
        [&](int i, int j, vec out) {
          if (i < rows && j < columns) store(y + (i * s.width + j) * C + c, out);
        });
}

// ---- Convolutions ----

// out [n, C] = x [n, C] times w [C, C], for n up to the next multiple of AT_ONCE.
INLINE void multiply(const float* x, const float* w, float* out, len n) {
  for (len first = 0; first < n; first += AT_ONCE)
    ROLLED for (int from = 0; from < C; from += PAIR) {
      vec sums[AT_ONCE][2] = {};
      ROLLED for (int i = 0; i < C; i++) {
        const vec left = load(w + i * C + from), right = load(w + i * C + from + LANES);
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
          const vec value = all(x[(first + k) * C + i]);
          sums[k][0] += value * left;
          sums[k][1] += value * right;
        }
      }
      UNROLL for (int k = 0; k < AT_ONCE; k++)
        UNROLL for (int v = 0; v < 2; v++) store(out + (first + k) * C + from + v * LANES, sums[k][v]);
    }
}

// y [B, H, W, C] = x [B, H, W, C] convolved with weight, in PyTorch's order [out, in, row, column]; or, turned, with the
// filters turned around and in and out exchanged: from the output's gradient to the input's.
void convolve(const float* x, const float* weight, float* y, len turned, len images, len height, len width, len threads) {
  const Tiling s{{images, height, width}};
  alignas(64) float filters[POINTS * PLANE];  // [POINTS, in, out]
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < C; i++)
      for (int o = 0; o < C; o += LANES)
        along_both<3, IN>(
            filter_to_points,
            [&](int row, int column) {
              const int tap = row * 3 + column;
              vec w;
              for (int v = 0; v < LANES; v++)
                w[v] = weight[turned ? (i * C + o + v) * 9 + 8 - tap : ((o + v) * C + i) * 9 + tap];
              return w;
            },
            [&](int row, int column, vec p) { store(filters + (row * IN + column) * PLANE + i * C + o, p); });
    alignas(64) float in[POINTS * TILES * C], out[POINTS * TILES * C];
#pragma omp for schedule(static)
    for (len first = 0; first < s.tiles(); first += TILES) {
      const len n = std::min(s.tiles() - first, len(TILES));
      for (len t = 0; t < n; t++) map_inputs(x, s, ImageTile(s, first + t), in + t * C);
      for (int p = 0; p < POINTS; p++) multiply(in + p * TILES * C, filters + p * PLANE, out + p * TILES * C, n);
      for (len t = 0; t < n; t++) map_outputs(out + t * C, s, ImageTile(s, first + t), y);
    }
  }
}

// The gradient at the filters. The tiles are summed in groups, whose number and borders depend on the images' size alone.
void convolve_to_filters(const float* grad, const float* x, float* grad_weight, len images, len height, len width,
                         len threads) {
  const Tiling s{{images, height, width}};
  len groups = 1;
  while (groups < 16 && groups * 128 <= s.tiles()) groups *= 2;
  const std::unique_ptr<float[]> sums(new float[groups * POINTS * PLANE]);  // [groups, POINTS, in, out]
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float in[POINTS * TILES * C], grad_points[POINTS * TILES * C];
#pragma omp for schedule(static)
    for (len group = 0; group < groups; group++) {
      const len end = s.tiles() * (group + 1) / groups;
      float* to = &sums[group * POINTS * PLANE];
      std::fill_n(to, POINTS * PLANE, 0.0f);
      for (len first = s.tiles() * group / groups; first < end; first += TILES) {
        const len n = std::min(end - first, len(TILES));
        for (len t = 0; t < n; t++) {
          const ImageTile tile(s, first + t);
          map_inputs(x, s, tile, in + t * C);
          pixels_to_points<OUT>(gradient_to_points, grad, s, tile.image, tile.row, tile.column, grad_points + t * C);
        }
        for (int p = 0; p < POINTS; p++) {  // 6 x 2 vectors of sums fit AVX2's 16 registers; the last 8 rows are 2 x 4
          const float *x_p = in + p * TILES * C, *grad_p = grad_points + p * TILES * C;
          auto inputs_from = [&](int i) { return [=](len t, int k, int) { return all(x_p[t * C + i + k]); }; };
          ROLLED for (int i = 0; i < C - 8; i += 6) add_times_gradient<6>(inputs_from(i), grad_p, n, to + p * PLANE + i * C);
          ROLLED for (int i = C - 8; i < C; i += 4) add_times_gradient<4>(inputs_from(i), grad_p, n, to + p * PLANE + i * C);
        }
      }
    }
#pragma omp for schedule(static)
    for (int i = 0; i < C; i++)
      for (int o = 0; o < C; o += LANES)
        along_both<IN, 3>(
            points_to_filter,
            [&](int row, int column) {
              vec sum = {};
              for (len group = 0; group < groups; group++)
                sum += load(&sums[(group * POINTS + row * IN + column) * PLANE + i * C + o]);
              return sum;
            },
            [&](int row, int column, vec w) {
              for (int v = 0; v < LANES; v++) grad_weight[((o + v) * C + i) * 9 + row * 3 + column] = w[v];
            });
  }
}

}  // namespace
