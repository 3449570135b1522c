// The learner's convolutions of C channels: 3x3, with a border of zeros, by Winograd's algorithm for tiles of 2x2 outputs
// (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1). A tile's 4x4 inputs and the
// filter are mapped linearly to 16 points each, multiplied point by point, summed over the channels and mapped back,
//   outputs = At ((G w Gt) * (Bt x B)) A,
// which takes 16 multiplications a pair of channels where the definition takes 36.

#pragma once

#include <algorithm>
#include "blocks.h"

namespace {

constexpr int POINTS = 16, PLANE = C * C;  // PLANE: one point of all filters
constexpr int TILES = 24;                  // tiles that are mapped, multiplied and mapped back at a time
constexpr int AT_ONCE = 6;                 // tiles whose sums are held in registers
static_assert(TILES % AT_ONCE == 0 && C % 6 == 2, "blocks fit");

struct Tiling : Shape {  // in tiles; rows and columns are counted up, where pooling drops the last odd one
  len across() const { return (width + 1) / 2; }
  len each() const { return (height + 1) / 2 * across(); }
  len tiles() const { return images * each(); }
};

struct ImageTile {  // its outputs' first pixel, and whether a second row and column are in the image
  len row, column, start;
  bool below, right;
  ImageTile(const Tiling& s, len k)
      : row(k % s.each() / s.across() * 2),
        column(k % s.across() * 2),
        start(((k / s.each() * s.height + row) * s.width + column) * C),
        below(row + 1 < s.height),
        right(column + 1 < s.width) {}
};

// Bt x B: the tile's inputs, which reach one pixel beyond its outputs on each side, at 16 points [POINTS, TILES, C].
template <class T>
INLINE void inputs_to_points(const T* x, const Tiling& s, const ImageTile& tile, const T* zeros, float* points) {
  const T* at[4][4];
  for (len i = 0; i < 4; i++)
    for (len j = 0; j < 4; j++) {
      const len row = tile.row + i - 1, column = tile.column + j - 1;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      at[i][j] = inside ? x + tile.start + ((i - 1) * s.width + j - 1) * C : zeros;
    }
  ROLLED for (int c = 0; c < C; c += LANES) {
    vec t[4][4];
    UNROLL for (int j = 0; j < 4; j++) {
      const vec a = load(at[0][j] + c), b = load(at[1][j] + c), d = load(at[2][j] + c), e = load(at[3][j] + c);
      t[0][j] = a - d, t[1][j] = b + d, t[2][j] = d - b, t[3][j] = b - e;
    }
    UNROLL for (int i = 0; i < 4; i++) {
      float* to = points + i * 4 * TILES * C + c;
      store(to, t[i][0] - t[i][2]);
      store(to + TILES * C, t[i][1] + t[i][2]);
      store(to + 2 * TILES * C, t[i][2] - t[i][1]);
      store(to + 3 * TILES * C, t[i][1] - t[i][3]);
    }
  }
}

// At p A: the tile's outputs from 16 points.
template <class T>
INLINE void points_to_outputs(const float* points, const Tiling& s, const ImageTile& tile, T* y) {
  y += tile.start;
  ROLLED for (int c = 0; c < C; c += LANES) {
    vec t[2][4];
    UNROLL for (int j = 0; j < 4; j++) {
      const float* p = points + j * TILES * C + c;
      const vec a = load(p), b = load(p + 4 * TILES * C), d = load(p + 8 * TILES * C), e = load(p + 12 * TILES * C);
      t[0][j] = a + b + d, t[1][j] = b - d - e;
    }
    store(y + c, t[0][0] + t[0][1] + t[0][2]);
    if (tile.right) store(y + C + c, t[0][1] - t[0][2] - t[0][3]);
    if (tile.below) store(y + s.width * C + c, t[1][0] + t[1][1] + t[1][2]);
    if (tile.below && tile.right) store(y + (s.width + 1) * C + c, t[1][1] - t[1][2] - t[1][3]);
  }
}

// A g At: the gradient at the tile's outputs, at 16 points.
template <class T>
INLINE void gradient_to_points(const T* grad, const Tiling& s, const ImageTile& tile, float* points) {
  grad += tile.start;
  ROLLED for (int c = 0; c < C; c += LANES) {
    const vec a = load(grad + c), b = tile.right ? load(grad + C + c) : vec{};
    const vec d = tile.below ? load(grad + s.width * C + c) : vec{};
    const vec e = tile.below && tile.right ? load(grad + (s.width + 1) * C + c) : vec{};
    const vec t[4][2] = {{a, b}, {a + d, b + e}, {a - d, b - e}, {-d, -e}};
    UNROLL for (int i = 0; i < 4; i++) {
      float* to = points + i * 4 * TILES * C + c;
      store(to, t[i][0]);
      store(to + TILES * C, t[i][0] + t[i][1]);
      store(to + 2 * TILES * C, t[i][0] - t[i][1]);
      store(to + 3 * TILES * C, -t[i][1]);
    }
  }
}

// G w Gt: filters [9, in, out] at 16 points [POINTS, in, out].
void filters_to_points(const float* w, float* points) {
  for (int k = 0; k < PLANE; k += LANES) {
    vec t[4][3];
    UNROLL for (int j = 0; j < 3; j++) {
      const vec a = load(w + j * PLANE + k), b = load(w + (3 + j) * PLANE + k), d = load(w + (6 + j) * PLANE + k);
      t[0][j] = a, t[1][j] = 0.5f * (a + b + d), t[2][j] = 0.5f * (a - b + d), t[3][j] = d;
    }
    UNROLL for (int i = 0; i < 4; i++) {
      float* to = points + i * 4 * PLANE + k;
      store(to, t[i][0]);
      store(to + PLANE, 0.5f * (t[i][0] + t[i][1] + t[i][2]));
      store(to + 2 * PLANE, 0.5f * (t[i][0] - t[i][1] + t[i][2]));
      store(to + 3 * PLANE, t[i][2]);
    }
  }
}

// Gt p G: a filter's gradient [3, 3] from its 16 points, PLANE numbers apart.
INLINE void points_to_filter(const float* points, float* grad) {
  float t[3][4];
  for (int j = 0; j < 4; j++) {
    const float* p = points + j * PLANE;
    const float sum = 0.5f * (p[4 * PLANE] + p[8 * PLANE]);
    t[0][j] = p[0] + sum, t[1][j] = 0.5f * (p[4 * PLANE] - p[8 * PLANE]), t[2][j] = sum + p[12 * PLANE];
  }
  for (int i = 0; i < 3; i++) {
    const float sum = 0.5f * (t[i][1] + t[i][2]);
    grad[3 * i] = t[i][0] + sum, grad[3 * i + 1] = 0.5f * (t[i][1] - t[i][2]), grad[3 * i + 2] = sum + t[i][3];
  }
}

// out [n, C] = x [n, C] times w [C, C], for n up to the next multiple of AT_ONCE.
INLINE void multiply(const float* x, const float* w, float* out, len n) {
  for (len first = 0; first < n; first += AT_ONCE)
    ROLLED for (int from = 0; from < C; from += PAIR) {
      vec sums[AT_ONCE][2] = {};
      ROLLED for (int i = 0; i < C; i++) {
        const vec left = load(w + i * C + from), right = load(w + i * C + from + LANES);
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
          const vec here = all(x[(first + k) * C + i]);
          sums[k][0] += here * left;
          sums[k][1] += here * right;
        }
      }
      UNROLL for (int k = 0; k < AT_ONCE; k++)
        UNROLL for (int v = 0; v < 2; v++) store(out + (first + k) * C + from + v * LANES, sums[k][v]);
    }
}

// y [B, H, W, C] = x [B, H, W, C] convolved with weight, in PyTorch's order [out, in, row, column]; or, turned, with the
// filters turned around and in and out exchanged.
template <class T>
void convolve_by(const float* weight, bool turned, const T* x, T* y, const Tiling& s, len threads) {
  std::vector<float> w(9 * PLANE), filters(POINTS * PLANE);  // w [9, in, out]
  for (int o = 0; o < C; o++)
    for (int i = 0; i < C; i++)
      for (int t = 0; t < 9; t++) w[turned ? (8 - t) * PLANE + o * C + i : t * PLANE + i * C + o] = weight[(o * C + i) * 9 + t];
  filters_to_points(w.data(), filters.data());
  const T zeros[C] = {};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> in(POINTS * TILES * C), out(POINTS * TILES * C);
#pragma omp for schedule(static)
    for (len first = 0; first < s.tiles(); first += TILES) {
      const len n = std::min(s.tiles() - first, len(TILES));
      for (len t = 0; t < n; t++) inputs_to_points(x, s, ImageTile(s, first + t), zeros, &in[t * C]);
      for (int p = 0; p < POINTS; p++) multiply(&in[p * TILES * C], &filters[p * PLANE], &out[p * TILES * C], n);
      for (len t = 0; t < n; t++) points_to_outputs(&out[t * C], s, ImageTile(s, first + t), y);
    }
  }
}

template <class T>
void convolve(const T* x, const float* weight, T* y, len images, len height, len width, len threads) {
  convolve_by(weight, false, x, y, Tiling{{images, height, width}}, threads);
}

// The gradient at x.
template <class T>
void convolve_to_input(const T* grad, const float* weight, T* grad_x, len images, len height, len width, len threads) {
  convolve_by(weight, true, grad, grad_x, Tiling{{images, height, width}}, threads);
}

// The gradient at the filters. The tiles are summed in groups, whose number and borders depend on the images' size alone.
template <class T>
void convolve_to_filters(const T* grad, const T* x, float* grad_weight, len images, len height, len width, len threads) {
  const Tiling s{{images, height, width}};
  len groups = 1;
  while (groups < 16 && groups * 512 <= s.tiles()) groups *= 2;
  std::vector<float> sums(groups * POINTS * PLANE);
  const T zeros[C] = {};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> in(POINTS * TILES * C), ahead(POINTS * TILES * C);
#pragma omp for schedule(static)
    for (len group = 0; group < groups; group++) {
      const len end = s.tiles() * (group + 1) / groups;
      float* to = &sums[group * POINTS * PLANE];
      for (len first = s.tiles() * group / groups; first < end; first += TILES) {
        const len n = std::min(end - first, len(TILES));
        for (len t = 0; t < n; t++) {
          const ImageTile tile(s, first + t);
          inputs_to_points(x, s, tile, zeros, &in[t * C]);
          gradient_to_points(grad, s, tile, &ahead[t * C]);
        }
        for (int p = 0; p < POINTS; p++) {  // 6 x 2 vectors of sums fit AVX2's 16 registers; the last 8 rows are 2 x 4
          const float *x_p = &in[p * TILES * C], *grad_p = &ahead[p * TILES * C];
          ROLLED for (int i = 0; i < C - 8; i += 6) add_outer_products<6>(x_p + i, C, grad_p, n, to + p * PLANE + i * C);
          ROLLED for (int i = C - 8; i < C; i += 4) add_outer_products<4>(x_p + i, C, grad_p, n, to + p * PLANE + i * C);
        }
      }
    }
  }
  for (len group = 1; group < groups; group++)
    for (len k = 0; k < POINTS * PLANE; k++) sums[k] += sums[group * POINTS * PLANE + k];
  for (int o = 0; o < C; o++)
    for (int i = 0; i < C; i++) points_to_filter(&sums[i * C + o], grad_weight + (o * C + i) * 9);
}

}  // namespace
