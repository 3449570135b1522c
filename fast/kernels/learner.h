// The loss and the gradient of the whole learner for one minibatch, in one call: on small minibatches PyTorch's overhead
// between operations is a good part of the time.

#pragma once

#include <memory>
#include "convolution.h"
#include "first.h"

namespace {

constexpr int BLOCKS = 4;

template <class Pointer>
struct Layers {  // a block's parameters or their gradients, in the learner's order
  Pointer weight, bias, gamma, beta;
};

struct Activations {  // what a block keeps for its backward pass; the first one has no y, and pools in registers
  Shape s;  // of its input
  const float* in;
  uint8_t* switches;
  std::unique_ptr<float[]> y, pooled, out;
  float mean[C], var[C];
};

// Mean cross entropy of the linear layer's logits for features in [images, area, C], and its gradients with respect to the
// layer's weight [classes, C, area], its bias and in. A label outside 0..classes-1 makes the loss NaN.
float classify(const float* in, const int64_t* labels, const float* weight, const float* bias, float* grad_weight,
               float* grad_bias, float* grad_in, len images, len area, len classes) {
  const len size = area * C;
  std::vector<float> w(classes * size), grad_w(classes * size);  // [classes, area, C]
  for (len k = 0; k < classes; k++)
    for (int c = 0; c < C; c++)
      for (len p = 0; p < area; p++) w[k * size + p * C + c] = weight[k * size + c * area + p];
  std::vector<double> logits(classes), grad_b(classes);
  double loss = 0;
  for (len b = 0; b < images; b++) {
    const float* features = in + b * size;
    for (len k = 0; k < classes; k++) {
      vec s = {};
      for (len j = 0; j < size; j += LANES) s += load(features + j) * load(&w[k * size + j]);
      logits[k] = bias[k] + sum(s);
    }
    const double largest = *std::max_element(logits.begin(), logits.end());
    double normalizer = 0;
    for (const double logit : logits) normalizer += std::exp(logit - largest);
    const bool valid = labels[b] >= 0 && labels[b] < classes;
    loss -= (valid ? logits[labels[b]] : NAN) - largest - std::log(normalizer);
    std::fill_n(grad_in + b * size, size, 0.0f);
    for (len k = 0; k < classes; k++) {
      const double grad_logit = (std::exp(logits[k] - largest) / normalizer - (k == labels[b])) / images;
      grad_b[k] += grad_logit;
      for (len j = 0; j < size; j += LANES) {
        float *to_w = &grad_w[k * size + j], *to_in = grad_in + b * size + j;
        store(to_w, load(to_w) + float(grad_logit) * load(features + j));
        store(to_in, load(to_in) + float(grad_logit) * load(&w[k * size + j]));
      }
    }
  }
  for (len k = 0; k < classes; k++) {
    grad_bias[k] = float(grad_b[k]);
    for (int c = 0; c < C; c++)
      for (len p = 0; p < area; p++) grad_weight[k * size + c * area + p] = grad_w[k * size + p * C + c];
  }
  return float(loss / images);
}

// x: images [images, height, width, 3]; patches and products: the moments of their patches. parameters: each block's, see
// Layers, then the classifier's weight and bias. grad: their gradients in one flat vector. running: the blocks' running means,
// then variances, updated with momentum. switches: one block's after the other's, found or, if FROZEN, obeyed; then the running
// statistics stay as they are.
template <bool FROZEN>
void learner_gradient(const float* x, const int64_t* labels, const double* patches, const double* products,
                      const float* const* parameters, float* const* running, float eps, float momentum, uint8_t* switches,
                      float* loss, float* grad, len images, len height, len width, len classes, len threads) {
  const auto* params = reinterpret_cast<const Layers<const float*>*>(parameters);
  std::vector<Activations> blocks;
  Shape s{images, height, width};
  for (int b = 0; b < BLOCKS; b++) {
    const auto& [weight, bias, gamma, beta] = params[b];
    blocks.push_back({s, b == 0 ? x : blocks.back().out.get(), switches});
    switches += images * s.pooled();
    Activations& a = blocks.back();
    a.out.reset(new float[images * s.pooled()]);
    if (b == 0) {
      first_forward<FROZEN>(x, weight, gamma, beta, eps, patches, products, a.switches, a.out.get(), a.mean, a.var,
                            images, height, width, threads);
    } else {
      a.y.reset(new float[s.count() * C]);
      a.pooled.reset(new float[images * s.pooled()]);
      convolve(a.in, weight, a.y.get(), false, images, s.height, s.width, threads);
      block_forward<FROZEN>(a.y.get(), gamma, beta, eps, a.pooled.get(), a.switches, a.out.get(), a.mean, a.var, images, s.height,
                            s.width, threads);
    }
    const float unbiased = float(s.count()) / std::max<len>(s.count() - 1, 1);
    for (int c = 0; c < C && !FROZEN; c++) {
      float *mean = running[b] + c, *var = running[BLOCKS + b] + c;
      *mean += momentum * (a.mean[c] + bias[c] - *mean);
      *var += momentum * (a.var[c] * unbiased - *var);
    }
    s = Shape{images, s.rows(), s.columns()};
  }
  Layers<float*> grads[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) {
    float* bias = grad + C * (b == 0 ? TAPS : 9 * C);
    grads[b] = {grad, bias, bias + C, bias + 2 * C};
    std::fill_n(bias, C, 0.0f);  // batch norm cancels the bias
    grad = bias + 3 * C;
  }
  const len area = s.height * s.width;
  const float* const* last = parameters + 4 * BLOCKS;
  std::unique_ptr<float[]> grad_out(new float[images * area * C]);
  float* grad_bias = grad + classes * area * C;
  *loss = classify(blocks.back().out.get(), labels, last[0], last[1], grad, grad_bias, grad_out.get(), images, area, classes);
  for (int b = BLOCKS - 1; b >= 0; b--) {
    const auto& [weight, bias, gamma, beta] = params[b];
    const Activations& a = blocks[b];
    const len height = a.s.height, width = a.s.width;
    if (b == 0) {
      first_backward(grad_out.get(), x, weight, a.switches, gamma, beta, a.mean, a.var, eps, patches, products, grads[b].weight,
                     grads[b].gamma, grads[b].beta, images, height, width, threads);
    } else {
      block_backward(grad_out.get(), a.pooled.get(), a.switches, a.y.get(), gamma, beta, a.mean, a.var, eps, grads[b].gamma,
                     grads[b].beta, images, height, width, threads);
      convolve_to_filters(a.y.get(), a.in, grads[b].weight, images, height, width, threads);
      grad_out.reset(new float[a.s.count() * C]);
      convolve(a.y.get(), weight, grad_out.get(), true, images, height, width, threads);
    }
  }
}

}  // namespace
