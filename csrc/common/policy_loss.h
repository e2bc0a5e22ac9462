// The maths of policy_loss for one pixel and for one sample, shared by csrc/cpu and csrc/cuda.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/platform.h"
#include "common/policy_loss_params.h"
#include "common/weighted_loss.h"

namespace diffdoctor {

// What is the same for every pixel of a sample.
template <typename acc_t>
struct PolicyStep {
  acc_t a, b, inverse;  // inverse: 1 / sigma; 0 for a step that drew nothing, which is left out
  acc_t log_prob;       // factor of the sum over channels of (next_latents - mu)^2
  acc_t kl;             // factor of the sum over channels of (model_pred - ref_pred)^2
  acc_t slope;          // factor of next_latents - mu in the gradient, beside the pixel's own
  acc_t kl_slope;       // factor of model_pred - ref_pred there
  acc_t old_mean;
  acc_t low, high, most;  // bounds of the ratio and of the advantage
  acc_t kl_weight;
};

// What of a step may differ from sample to sample: a, b, sigma, the gradient of the loss; divisor: of the reduction.
// The fields from old_mean on are left as they are.
template <typename acc_t>
DD_HD void set_coefs(PolicyStep<acc_t>& s, acc_t a, acc_t b, acc_t sigma, acc_t grad_output, acc_t channels,
                     acc_t divisor) {
  s.a = a;
  s.b = b;
  s.inverse = sigma == 0 ? acc_t(0) : 1 / sigma;
  s.log_prob = acc_t(-0.5) * s.inverse * s.inverse / channels;
  const acc_t scale = b * s.inverse;
  s.kl = acc_t(0.5) * scale * scale / channels;
  const acc_t g = grad_output / divisor / channels;
  s.slope = g * scale * s.inverse;
  s.kl_slope = g * s.kl_weight * scale * scale;
}

// pixels: of a sample.
template <typename acc_t>
DD_HD acc_t policy_divisor(const PolicyLossParams& p, int64_t batch, int64_t pixels) {
  return p.reduction == kMean ? acc_t(batch) * acc_t(pixels) : p.reduction == kSample ? acc_t(pixels) : acc_t(1);
}

template <typename acc_t>
DD_HD PolicyStep<acc_t> policy_step(const PolicyLossParams& p, int64_t batch, int64_t pixels, int64_t index) {
  PolicyStep<acc_t> s;
  s.old_mean = p.old == kOldPerSample ? load_per_sample<acc_t>(p.old_mean, index) : acc_t(0);
  s.low = acc_t(1) - acc_t(p.clip_low);
  s.high = acc_t(1) + acc_t(p.clip_high);
  s.most = acc_t(p.advantage_clip);
  s.kl_weight = acc_t(p.kl_weight);
  set_coefs(s, load_per_sample<acc_t>(p.a, index), load_per_sample<acc_t>(p.b, index),
            load_per_sample<acc_t>(p.sigma, index), load_per_sample<acc_t>(p.grad_output, index),
            acc_t(p.grid.size[p.channel_dim]), policy_divisor<acc_t>(p, batch, pixels));
  return s;
}

// An advantage as it counts: within its bounds, and 0 for a NaN.
template <typename acc_t>
DD_HD acc_t bounded_advantage(acc_t value, acc_t most) {
  const acc_t above = value < -most ? -most : value;
  const acc_t within = above > most ? most : above;
  return within == within ? within : acc_t(0);
}

template <typename acc_t>
struct PolicyTerm {
  acc_t loss;   // max(-A r, -A clip(r)); 0 where A is 0, whatever the ratio
  acc_t slope;  // its derivative by the log-probability
  bool cut;     // the clipping takes the gradient away
};

// Choices alone, no branches: on the CPU a loop over it must vectorise.
template <typename acc_t>
DD_HD PolicyTerm<acc_t> policy_term(acc_t ratio, acc_t advantage, acc_t low, acc_t high) {
  const acc_t above = ratio < low ? low : ratio, bounded = above > high ? high : above;
  const acc_t plain = -advantage * ratio, clipped = -advantage * bounded;
  const acc_t loss = plain < clipped ? clipped : plain, slope = plain < clipped ? acc_t(0) : plain;
  return {advantage == 0 ? acc_t(0) : loss, advantage == 0 ? acc_t(0) : slope,
          bool((advantage != 0) & (plain < clipped))};
}

// What level "sample" adds up over a sample's pixels before it knows the ratio, the mask k as the weight.
enum PolicyMoment : int32_t {
  kMomentChange = 0,    // k (lp - old)
  kMomentWeight = 1,    // k
  kMomentPositive = 2,  // k A where A > 0
  kMomentNegative = 3,  // k A where A < 0
  kPolicyMoments = 4,
};

// The sample's ratio, and what stands for a pixel's slope: the derivative of the sample's summed loss by its
// log-probability, divided by the weights' sum, of which the pixel takes its k.
template <typename acc_t>
struct SampleRatio {
  acc_t ratio, slope;
};

template <typename acc_t>
DD_HD SampleRatio<acc_t> sample_ratio(const double (&moments)[kPolicyMoments], acc_t low, acc_t high) {
  const double weight = moments[kMomentWeight];
  const acc_t ratio = std::exp(acc_t(weight == 0 ? 0.0 : moments[kMomentChange] / weight));
  // A ratio that is NaN is taken.
  const double positive = ratio > high ? 0.0 : moments[kMomentPositive];
  const double negative = ratio < low ? 0.0 : moments[kMomentNegative];
  const double advantage = positive + negative;
  if (weight == 0 || advantage == 0) return {ratio, 0};
  return {ratio, acc_t(-advantage / weight) * ratio};
}

}  // namespace diffdoctor
