// The arithmetic of weighted_loss on N elements in registers. The kind of loss is the outer loop, so that its uniform
// branches cost once per N elements.
#pragma once

#include "common/losses.h"
#include "common/weighted_loss.h"

namespace diffdoctor::cuda {

// What is the same for every element of a sample.
template <typename acc_t>
struct Sample {
  acc_t pred_scale, huber_c, v, gradient_scale;
  Line<acc_t> coef[kMaxTerms];
  bool selected;   // v != 0
  bool zero_grad;  // its gradient is exactly 0

  __device__ __forceinline__ Sample(const WeightedLossParams& p, int64_t b) {
    pred_scale = load_per_sample<acc_t>(p.pred_scale, b);
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) coef[k] = k < p.num_terms ? term_coef<acc_t>(p, k, b) : Line<acc_t>{0, 0};
    huber_c = load_per_sample<acc_t>(p.huber_c, b);
    v = load_per_sample<acc_t>(p.weight, b);
    gradient_scale = sample_gradient_scale<acc_t>(p, b);
    selected = sample_selected<acc_t>(p, b);
    zero_grad = !selected || load_per_sample<acc_t>(p.z, b) == 0;
  }
};

// The losses of a mixture, worked out on the host: a comparison of doubles costs a GPU more than the loss.
struct Mixture {
  unsigned kinds;  // bit j: strength[j] != 0
  float strength[kLossKinds];

  explicit Mixture(const WeightedLossParams& p) : kinds(0) {
    for (int j = 0; j < kLossKinds; ++j) {
      strength[j] = static_cast<float>(p.strength[j]);
      kinds |= p.strength[j] != 0 ? 1u << j : 0u;
    }
  }
};

template <typename acc_t, int N, typename Loss>
__device__ __forceinline__ void add_losses(acc_t s, const acc_t (&d)[N], acc_t (&loss)[N], acc_t (&slope)[N],
                                           Loss one) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    acc_t l, g;
    one(d[j], l, g);
    loss[j] += s * l;
    slope[j] += s * g;
  }
}

template <typename acc_t, int N>
__device__ __forceinline__ void eval_losses(const WeightedLossParams& p, const Mixture& mixture,
                                            const Sample<acc_t>& sample, const acc_t (&d)[N], acc_t (&loss)[N],
                                            acc_t (&slope)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) loss[j] = slope[j] = 0;
  const acc_t c = sample.huber_c;
  const auto add = [&](auto tag) {
    if ((mixture.kinds >> tag.kind & 1u) == 0) return;
    const acc_t strength = sizeof(acc_t) == 8 ? acc_t(p.strength[tag.kind]) : acc_t(mixture.strength[tag.kind]);
    add_losses(strength, d, loss, slope, [tag, c](acc_t x, acc_t& l, acc_t& g) { element_loss(tag, x, c, l, g); });
  };
  add(LossTag<kL2>());
  if (mixture.kinds <= 1u << kL2) return;
  for_each_loss([&](auto tag) {
    if (tag.kind != kL2) add(tag);
  });
}

}  // namespace diffdoctor::cuda
