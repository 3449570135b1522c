// Crop, resize, flip and colour jitter, see augment.py.

#pragma once

#include <algorithm>
#include <cmath>
#include "vectors.h"

namespace {

// The antialiased bilinear filter along one axis, the same as _weights in augment.py: for each of size results the first pixel
// that counts, and the weights from that pixel on.
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

INLINE vec clamp(vec x, float low, float high) { return at_most(at_least(x, low), high); }
INLINE vec absolute(vec x) { return floats(bits(x) & 0x7fffffff); }
INLINE vec whole(vec x) {  // the largest whole number <= x
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
  const len area = size * size, plane = (area + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(3 * plane), rows, row(size);
#pragma omp for schedule(static)
    for (len b = 0; b < images; b++) {
      auto window = [&](int what, int axis) { return windows[(what * images + b) * 2 + axis]; };
      const Filter down(window(0, 0), window(1, 0), window(2, 0), window(3, 0), int(size));
      const Filter across(window(0, 1), window(1, 1), window(2, 1), window(3, 1), int(size));
      const len left = window(0, 1), right = left + window(1, 1);
      rows.resize(width + across.taps);
      for (len c = 0; c < 3; c++)
        for (len r = 0; r < size; r++) {
          const uint8_t* from = pixels + ((b * 3 + c) * height + down.first[r]) * width;
          const len taps = std::min<len>(down.taps, height - down.first[r]);
          for (len q = left; q < right; q++) rows[q] = from[q] * down.weight[r];
          for (len k = 1; k < taps; k++)
            for (len q = left; q < right; q++) rows[q] += from[k * width + q] * down.weight[k * size + r];
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
        const float shift = -mean[c] / deviation[c], scale = 1 / (255 * deviation[c]);
        for (len k = 0; k < area; k++) out[(b * area + k) * 3 + c] = shift + x[c * plane + k] * scale;
      }
    }
  }
}

}  // namespace
