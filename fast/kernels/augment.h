// Crop, resize, flip and colour jitter, see augment.py.

#pragma once

#include <algorithm>
#include <cmath>
#include "vectors.h"

namespace {

// The antialiased bilinear filter along one axis, the same as _weights in augment.py: for each of size outputs the first input
// pixel with a weight, and the weights from it on; with flip, in reverse order. Outputs up to a multiple of LANES are padding.
struct Filter {
  static constexpr int ENLARGES = 3;  // taps of a filter that does not downsample
  int taps, padded;
  std::vector<int> first;
  std::vector<float> weight;  // [taps, padded]
  Filter(len start, len extent, len out, len skip, int size, bool flip = false) : padded(whole_vectors(size)), first(padded) {
    const float scale = float(extent) / float(out), reach = std::max(scale, 1.0f);
    taps = int(std::ceil(2 * reach)) + 1;
    weight.assign(taps * padded, 0);
    for (int place = 0; place < padded; place++) {
      const int t = std::max(flip ? size - 1 - place : place, 0);
      const float centre = (float(t + skip) + 0.5f) * scale;
      const int from = std::clamp<int>(int(std::floor(centre - reach)), 0, std::max<len>(extent - taps, 0));
      float total = 0;
      for (int k = 0; k < taps && from + k < extent; k++) {
        const float w = std::max(0.0f, 1 - std::fabs(float(from + k) + 0.5f - centre) / reach);
        weight[k * padded + place] = w;
        total += w;
      }
      for (int k = 0; k < taps; k++) weight[k * padded + place] /= total;
      first[place] = int(start) + from;
    }
  }
};

// Output row r of the vertical filter, columns left to right, from a plane [height, width]; taps rows have weights. TAPS is
// their number if the compiler is to know it, else 0.
template <int TAPS>
INLINE void filter_down(const uint8_t* plane, len width, const Filter& filter, len r, len taps, len left, len right, float* row) {
  const uint8_t* from = plane + filter.first[r] * width;
  const float* weight = &filter.weight[r];
  const len n = TAPS ? TAPS : taps;
  auto one_vector = [&](len q) {
    vec sum = numbers(widened(from + q)) * weight[0];
    for (len k = 1; k < n; k++) sum += numbers(widened(from + k * width + q)) * weight[k * filter.padded];
    store(row + q, sum);
  };
  len q = left;
  for (; q + LANES <= right; q += LANES) one_vector(q);
  if (q < right && right - left >= LANES) {
    one_vector(right - LANES);  // overlaps the one before
    return;
  }
  for (; q < right; q++) {
    row[q] = from[q] * weight[0];
    for (len k = 1; k < n; k++) row[q] += from[k * width + q] * weight[k * filter.padded];
  }
}

// All outputs of the horizontal filter for one row. TAPS as above; LANES outputs of a filter that does not downsample read
// LANES inputs.
template <int TAPS>
INLINE void filter_across(const float* row, const Filter& filter, float* results) {
  for (int q = 0; q < filter.padded; q += LANES) {
    const int *first = &filter.first[q], base = std::min(first[0], first[LANES - 1]);
    ivec at;
    std::memcpy(&at, first, sizeof at);
    at -= base;
    vec sum{};
    for (int k = 0; k < (TAPS ? TAPS : filter.taps); k++) {
      vec x;
      if (TAPS == Filter::ENLARGES) x = permuted(load(row + base + k), at);
      else
        for (int lane = 0; lane < LANES; lane++) x[lane] = row[first[lane] + k];
      sum += x * load(&filter.weight[k * filter.padded + q]);
    }
    store(results + q, sum);
  }
}

// Planes [3, plane] -> result [n, 3], each colour times its scale plus its shift.
INLINE void interleave(const float* planes, len plane, const float* scale, const float* shift, float* result, len n) {
  ivec at[3], colour[3];
  for (int j = 0; j < 3; j++)
    for (int lane = 0; lane < LANES; lane++) at[j][lane] = (j * LANES + lane) / 3, colour[j][lane] = (j * LANES + lane) % 3;
  len k = 0;
  for (; k + LANES <= n; k += LANES) {
    vec x[3];
    UNROLL for (int c = 0; c < 3; c++) x[c] = shift[c] + load(planes + c * plane + k) * scale[c];
    UNROLL for (int j = 0; j < 3; j++) {
      const vec red = permuted(x[0], at[j]), green = permuted(x[1], at[j]), blue = permuted(x[2], at[j]);
      store(result + 3 * k + j * LANES, colour[j] == 0 ? red : colour[j] == 1 ? green : blue);
    }
  }
  for (; k < n; k++)
    for (int c = 0; c < 3; c++) result[3 * k + c] = shift[c] + planes[c * plane + k] * scale[c];
}

enum Step { BRIGHTNESS, CONTRAST, SATURATION, HUE };
constexpr float GREY[3] = {0.299f, 0.587f, 0.114f};

INLINE vec clamp(vec x, float low, float high) { return at_most(at_least(x, low), high); }
INLINE vec absolute(vec x) { return floats(bits(x) & 0x7fffffff); }
INLINE vec whole(vec x) {  // the largest whole number <= x
  const vec t = numbers(integers(x));
  return t > x ? t - 1.0f : t;
}
INLINE vec grey(vec r, vec g, vec b) { return r * GREY[0] + g * GREY[1] + b * GREY[2]; }

INLINE void turn_hue(vec& r, vec& g, vec& b, float turns) {
  const vec high = r > g ? r : g, top = high > b ? high : b, low = r < g ? r : g, bottom = low < b ? low : b;
  const vec chroma = top - bottom, unit = (255.0f / 6) / at_least(chroma, 1e-6f);
  vec hue = r == top ? (g - b) * unit : (g == top ? (b - r) * unit + 85.0f : (r - g) * unit + 170.0f);
  hue = whole(hue);  // 0 to 254 for Pillow, whose bytes then wrap at 256
  hue = (hue < 0.0f ? hue + 255.0f : hue) + std::trunc(turns * 255);
  hue = (hue - 256.0f * whole(hue / 256.0f)) * (6.0f / 255);
  r = bottom + chroma * clamp(absolute(hue - 3.0f) - 1.0f, 0, 1);
  g = bottom + chroma * clamp(2.0f - absolute(hue - 2.0f), 0, 1);
  b = bottom + chroma * clamp(2.0f - absolute(hue - 4.0f), 0, 1);
}

// Applies one step of ColorJitter to the planes x [3, plane]: the image's pixels, padded to whole vectors.
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

// pixels [images, 3, height, width] -> out [images, size, size, 3]. windows [4, images, 2] is an augment.Windows; jitter and
// order are [images, 4] or null; mean and deviation [3] are those of pixels from 0 to 1.
void augment(const uint8_t* pixels, const len* windows, const uint8_t* flip, const float* jitter, const len* order,
             const float* mean, const float* deviation, float* out, len size, len images, len height, len width, len threads) {
  const len area = size * size, plane = whole_vectors(int(area)) + LANES;  // and room for the last row's padding
  float scale[3], shift[3];
  for (int c = 0; c < 3; c++) scale[c] = 1 / (255 * deviation[c]), shift[c] = -mean[c] / deviation[c];
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(3 * plane), row;
#pragma omp for schedule(static)
    for (len b = 0; b < images; b++) {
      auto window = [&](int what, int axis) { return windows[(what * images + b) * 2 + axis]; };
      const Filter down(window(0, 0), window(1, 0), window(2, 0), window(3, 0), int(size));
      const Filter across(window(0, 1), window(1, 1), window(2, 1), window(3, 1), int(size), flip[b]);
      const len left = window(0, 1), right = left + window(1, 1);
      row.assign(width + across.taps + LANES, 0);
      for (len c = 0; c < 3; c++)
        for (len r = 0; r < size; r++) {
          const len taps = std::min<len>(down.taps, height - down.first[r]);
          const bool few = taps == Filter::ENLARGES, near = across.taps == Filter::ENLARGES;
          (few ? filter_down<Filter::ENLARGES> : filter_down<0>)(pixels + (b * 3 + c) * height * width, width, down, r, taps,
                                                                  left, right, row.data());
          // the next row overwrites this one's padding
          (near ? filter_across<Filter::ENLARGES> : filter_across<0>)(row.data(), across, &x[c * plane + r * size]);
        }
      if (jitter)
        for (int k = 0; k < 4; k++) adjust(x.data(), plane, area, int(order[b * 4 + k]), jitter[b * 4 + order[b * 4 + k]]);
      interleave(x.data(), plane, scale, shift, out + b * area * 3, area);
    }
  }
}

}  // namespace
