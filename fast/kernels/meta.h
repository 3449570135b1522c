// One update by the meta-learner, with the names of metalearner.py.
//
// The P coordinates are divided into tiles of TILE. The LSTM's state, h and c, is stored as [tiles, H, TILE], its input x as
// [tiles, 2, TILE], all else as [P].

#pragma once

#include <algorithm>
#include <cmath>
#include "vectors.h"

namespace {

constexpr int TILE = 128;  // coordinates of a tile
constexpr float SMALL = 4.539992976e-05f;  // e^-10, where prep changes its form
constexpr int CHUNKS = 16;  // partial sums, the same number for any number of threads, so that threads change no bit
// The block of sums that weighted_sums keeps in registers; a smaller one would wait for the latency of its additions.
constexpr int HELD = 5, WIDE = REGISTERS == 32 ? 4 : 2;  // rows, and vectors of each

// out [rows, TILE] = start [rows], or zeros, + w times in [n, TILE]; w's number (r, k) lies at r * step + k * along.
INLINE void weighted_sums(const float* w, int step, int along, const float* start, const float* in, int rows, int n,
                          float* out) {
  for (int first = 0; first < rows; first += HELD)
    for (int from = 0; from < TILE; from += WIDE * LANES) {
      const int n_held = std::min(rows - first, HELD);
      const float* weight[HELD];
      vec sums[HELD][WIDE];
      UNROLL for (int p = 0; p < HELD; p++) {
        const int r = first + (p < n_held ? p : 0);
        weight[p] = w + r * step;
        UNROLL for (int v = 0; v < WIDE; v++) sums[p][v] = all(start ? start[r] : 0);
      }
      ROLLED for (int k = 0; k < n; k++) {
        vec x[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) x[v] = load(in + k * TILE + from + v * LANES);
        UNROLL for (int p = 0; p < HELD; p++) {
          const vec value = all(weight[p][k * along]);
          UNROLL for (int v = 0; v < WIDE; v++) sums[p][v] += value * x[v];
        }
      }
      for (int p = 0; p < n_held; p++)
        UNROLL for (int v = 0; v < WIDE; v++) store(out + (first + p) * TILE + from + v * LANES, sums[p][v]);
    }
}

INLINE void prep(float x, float* first, float* second) {
  const float size = std::fabs(x);
  const bool large = size >= SMALL;
  *first = large ? std::log(size + 1e-8f) / 10 : -1;
  *second = large ? (x > 0 ? 1.0f : -1.0f) : 22026.465794806718f * x;
  if (x != x) *first = *second = x;
}

// The gradient with respect to x from those with respect to the two numbers that prep makes of it.
INLINE float through_prep(float x, float of_first, float of_second) {
  const float size = std::fabs(x);
  const bool large = size >= SMALL;
  return large ? of_first * (x > 0 ? 1.0f : -1.0f) / (10 * (size + 1e-8f)) : of_second / SMALL;
}

// The LSTM's weights for the inputs that differ between coordinates, [4H, 2 + H], and its bias, which includes prep(loss): that
// input is the same for all coordinates.
struct Lstm {
  float of_loss[2];
  std::vector<float> weight, bias;
  Lstm(const float* loss, const float* w_ih, const float* w_hh, const float* b_ih, const float* b_hh, len H)
      : weight(4 * H * (H + 2)), bias(4 * H) {
    prep(*loss, of_loss, of_loss + 1);
    for (len r = 0; r < 4 * H; r++) {
      float* to = std::copy_n(w_ih + r * 4 + 2, 2, &weight[r * (H + 2)]);
      std::copy_n(w_hh + r * H, H, to);
      bias[r] = b_ih[r] + b_hh[r] + w_ih[r * 4] * of_loss[0] + w_ih[r * 4 + 1] * of_loss[1];
    }
  }
};

// One step of the LSTM for a tile of coordinates: from its input z [2 + H, TILE] (x and the last h) and c to the gates
// [4 H, TILE] in PyTorch's order (input, forget, candidate, output), new_c, its tanh (squashed) and new_h.
INLINE void lstm_tile(const Lstm& lstm, int H, const float* z, const float* c, float* gates, float* squashed, float* new_c,
                      float* new_h) {
  weighted_sums(lstm.weight.data(), H + 2, 1, lstm.bias.data(), z, 4 * H, H + 2, gates);
  for (int at = 0; at < H * TILE; at += LANES) {
    float* of = gates + at;
    const vec i = gate(load(of)), f = gate(load(of + H * TILE)), g = hyperbolic_tangent(load(of + 2 * H * TILE));
    store(of, i);
    store(of + H * TILE, f);
    store(of + 2 * H * TILE, g);
    store(of + 3 * H * TILE, gate(load(of + 3 * H * TILE)));
    store(new_c + at, f * load(c + at) + i * g);
  }
  for (int at = 0; at < H * TILE; at += LANES) {  // a loop of its own, or it would wait for the stores of the first
    const vec s = hyperbolic_tangent(load(new_c + at));
    store(squashed + at, s);
    store(new_h + at, load(gates + 3 * H * TILE + at) * s);
  }
}

INLINE len tiles(len P) { return (P + TILE - 1) / TILE; }

struct Tile {  // the coordinates of one tile; the last tile may be cut short
  len start, size;
  Tile(len t, len P) : start(t * TILE), size(std::min<len>(TILE, P - t * TILE)) {}
  void get(float* to, const float* from) const {
    std::memcpy(to, from + start, size * sizeof(float));
    std::memset(to + size, 0, (TILE - size) * sizeof(float));
  }
  void put(float* to, const float* from) const { std::memcpy(to + start, from, size * sizeof(float)); }
};

void meta_forward(const float* loss, const float* w_ih, const float* w_hh, const float* b_ih, const float* b_hh,
                  const float* wf, const float* bf, const float* wi, const float* bi, const float* grad, const float* h,
                  const float* c, const float* f, const float* i, const float* theta, float* x, float* new_h, float* new_c,
                  float* new_f, float* new_i, float* new_theta, len H, len P, len threads) {
  const Lstm lstm(loss, w_ih, w_hh, b_ih, b_hh, H);
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
      lstm_tile(lstm, H, z.data(), c + state, gates.data(), squashed.data(), new_c + state, new_h + state);
      tile.get(fo.data(), f);
      tile.get(io.data(), i);
      tile.get(th.data(), theta);
      for (int at = 0; at < TILE; at += LANES) {
        const vec value = load(&th[at]);
        vec forget = value * wf[H] + load(&fo[at]) * wf[H + 1] + bf[0];
        vec input = value * wi[H] + load(&io[at]) * wi[H + 1] + bi[0];
        for (int u = 0; u < H; u++) {
          const vec h_u = load(new_h + state + u * TILE + at);
          forget += h_u * wf[u];
          input += h_u * wi[u];
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

void meta_backward(const float* loss, const float* w_ih, const float* w_hh, const float* b_ih, const float* b_hh,
                   const float* wf, const float* wi, const float* grad, const float* x, const float* h, const float* c,
                   const float* f, const float* i, const float* theta, const float* new_f, const float* new_i,
                   const float* grad_new_h, const float* grad_new_c, const float* grad_new_f, const float* grad_new_i,
                   const float* grad_new_theta, float* grad_loss, float* grad_grad, float* grad_w_ih, float* grad_w_hh, float* grad_bias, float* grad_wf,
                   float* grad_bf, float* grad_wi, float* grad_bi, float* grad_h, float* grad_c, float* grad_f, float* grad_i,
                   float* grad_theta, len H, len P, len threads) {
  const Lstm lstm(loss, w_ih, w_hh, b_ih, b_hh, H);
  const int columns = (H + 3 + COLUMNS - 1) / COLUMNS * COLUMNS;  // z, ones for the bias, zeros up to a multiple of COLUMNS
  const int cells = H + 3, size = 4 * H * columns, all_sizes = size + 2 * cells;
  std::vector<double> parts(CHUNKS * all_sizes);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> z(columns * TILE), gates(4 * H * TILE), squashed(H * TILE), out_c(H * TILE), out_h(H * TILE);
    std::vector<float> sums(size * LANES), f_sums(cells * LANES), i_sums(cells * LANES);
    std::vector<float> g(TILE), th(TILE), fo(TILE), io(TILE), nf(TILE), ni(TILE), df(TILE), di(TILE), dth(TILE), dg(TILE), dx(2 * TILE);
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
        lstm_tile(lstm, H, z.data(), cell, gates.data(), squashed.data(), out_c.data(), out_h.data());
        tile.get(g.data(), grad);
        tile.get(th.data(), theta);
        tile.get(fo.data(), f);
        tile.get(io.data(), i);
        tile.get(nf.data(), new_f);
        tile.get(ni.data(), new_i);
        tile.get(df.data(), grad_new_f);
        tile.get(di.data(), grad_new_i);
        tile.get(dth.data(), grad_new_theta);
        auto add = [&](int k, vec with_f, vec with_i) {
          store(&f_sums[k * LANES], load(&f_sums[k * LANES]) + with_f);
          store(&i_sums[k * LANES], load(&i_sums[k * LANES]) + with_i);
        };
        for (int at = 0; at < TILE; at += LANES) {
          const vec value = load(&th[at]), d = load(&dth[at]);
          const vec forget = sigmoid(load(&nf[at])), input = sigmoid(load(&ni[at]));
          const vec to_f = load(&df[at]) + d * value * forget * (1.0f - forget);
          const vec to_i = load(&di[at]) - d * load(&g[at]) * input * (1.0f - input);
          add(H, to_f * value, to_i * value);
          add(H + 1, to_f * load(&fo[at]), to_i * load(&io[at]));
          add(H + 2, to_f, to_i);
          store(&dg[at], -d * input);
          store(&dth[at], d * forget + to_f * wf[H] + to_i * wi[H]);
          store(&df[at], to_f);
          store(&di[at], to_i);
        }
        for (int u = 0; u < H; u++) {
          vec with_f = {}, with_i = {};
          for (int at = 0; at < TILE; at += LANES) {
            const int k = u * TILE + at;
            float* gate = &gates[k];
            const vec to_f = load(&df[at]), to_i = load(&di[at]), h_u = load(&out_h[k]), s = load(&squashed[k]);
            const vec d_h = load(to_h + k) + to_f * wf[u] + to_i * wi[u];
            const vec i_u = load(gate), f_u = load(gate + H * TILE), g_u = load(gate + 2 * H * TILE);
            const vec o_u = load(gate + 3 * H * TILE), d_c = load(to_c + k) + d_h * o_u * (1.0f - s * s);
            with_f += to_f * h_u;
            with_i += to_i * h_u;
            store(gate, d_c * g_u * i_u * (1.0f - i_u));
            store(gate + H * TILE, d_c * load(cell + k) * f_u * (1.0f - f_u));
            store(gate + 2 * H * TILE, d_c * i_u * (1.0f - g_u * g_u));
            store(gate + 3 * H * TILE, d_h * s * o_u * (1.0f - o_u));
            store(grad_c + state + k, d_c * f_u);
          }
          add(u, with_f, with_i);
        }
        for (int at = 0; at < TILE; at += LANES) {
          store(&df[at], load(&df[at]) * wf[H + 1]);
          store(&di[at], load(&di[at]) * wi[H + 1]);
        }
        add_products(gates.data(), 4 * H, z.data(), columns, TILE, sums.data());
        weighted_sums(lstm.weight.data() + 2, 1, H + 2, nullptr, gates.data(), H, 4 * H, grad_h + state);
        if (grad_grad) {
          weighted_sums(lstm.weight.data(), 1, H + 2, nullptr, gates.data(), 2, 4 * H, dx.data());
          for (int k = 0; k < TILE; k++) dg[k] += through_prep(g[k], dx[k], dx[TILE + k]);
          tile.put(grad_grad, dg.data());
        }
        tile.put(grad_f, df.data());
        tile.put(grad_i, di.data());
        tile.put(grad_theta, dth.data());
      }
      double* part = &parts[chunk * all_sizes];
      for (const auto* part_sums : {&sums, &f_sums, &i_sums})
        for (size_t k = 0; k < part_sums->size(); k += LANES) *part++ = sum(load(&(*part_sums)[k]));
    }
  }
  std::vector<double> totals(all_sizes);
  total(parts, CHUNKS, all_sizes, totals.data());
  for (int r = 0; r < 4 * H; r++) {
    const double* of_row = &totals[r * columns];
    grad_bias[r] = float(of_row[H + 2]);
    for (int k = 0; k < 2; k++) {
      grad_w_ih[r * 4 + k] = grad_bias[r] * lstm.of_loss[k];
      grad_w_ih[r * 4 + 2 + k] = float(of_row[k]);
    }
    for (int k = 0; k < H; k++) grad_w_hh[r * H + k] = float(of_row[2 + k]);
  }
  if (grad_loss) {
    double of_loss[2] = {};
    for (int r = 0; r < 4 * H; r++)
      for (int k = 0; k < 2; k++) of_loss[k] += totals[r * columns + H + 2] * w_ih[r * 4 + k];
    *grad_loss = through_prep(*loss, float(of_loss[0]), float(of_loss[1]));
  }
  const double *of_f = &totals[size], *of_i = of_f + cells;
  for (int k = 0; k < H + 2; k++) grad_wf[k] = float(of_f[k]), grad_wi[k] = float(of_i[k]);
  *grad_bf = float(of_f[H + 2]);
  *grad_bi = float(of_i[H + 2]);
}

}  // namespace
