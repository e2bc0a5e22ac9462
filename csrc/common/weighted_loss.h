// The maths of weighted_loss for one element and for one sample, shared by csrc/cpu and csrc/cuda.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/losses.h"
#include "common/platform.h"
#include "common/resample.h"
#include "common/weighted_loss_params.h"

namespace diffdoctor {

// u = c^gamma where c >= threshold, which is at least 0, else 0; c above 1 counts as 1. A NaN counts as clean.
template <typename acc_t>
DD_HD acc_t artifact_level(const WeightedLossParams& p, acc_t c) {
  if (!(c >= acc_t(p.threshold))) return 0;
  const acc_t level = c < 1 ? c : acc_t(1);
  return p.gamma == 1 ? level : std::pow(level, acc_t(p.gamma));
}

// k: a mask's value in [0, 1], and 0 for a NaN.
template <typename acc_t>
DD_HD acc_t region(acc_t value) {
  const acc_t above = value > 0 ? value : acc_t(0);
  return above < 1 ? above : acc_t(1);
}

// What LossStats counts of a map's value: whether it is a number outside [0, 1].
template <typename acc_t>
DD_HD bool is_outside(acc_t value) {
  return value < 0 || value > 1;
}

// What changes in a straight line with u: `clean` where u is 0, `clean + step` where it is 1.
template <typename acc_t>
struct Line {
  acc_t clean, step;
};

template <typename acc_t>
DD_HD acc_t at_level(const Line<acc_t>& line, acc_t u) {
  return line.clean + line.step * u;
}

// omega without the mask.
template <typename acc_t>
DD_HD Line<acc_t> spatial_weight(const WeightedLossParams& p) {
  return {acc_t(p.clean_weight), acc_t(p.artifact_weight - p.clean_weight)};
}

// m.
template <typename acc_t>
DD_HD Line<acc_t> gradient_weight(const WeightedLossParams& p) {
  return {acc_t(p.clean_grad), acc_t(p.artifact_grad - p.clean_grad)};
}

// A term's coefficient.
template <typename acc_t>
DD_HD Line<acc_t> term_coef(const WeightedLossParams& p, int k, int64_t b) {
  const acc_t clean = load_per_sample<acc_t>(p.coefs[k], b);
  return {clean, p.spatial_coefs ? load_per_sample<acc_t>(p.artifact_coefs[k], b) - clean : acc_t(0)};
}

// E: what the reduction divides the gradient by.
template <typename acc_t>
DD_HD acc_t reduction_divisor(const WeightedLossParams& p) {
  if (p.reduction == kMean) return acc_t(p.batch) * acc_t(p.count);
  return p.reduction == kSample ? acc_t(p.count) : acc_t(1);
}

// Factor of the gradient that is the same for a whole sample: g * v * pred_scale / (Z * E); 0 for a sample left out.
template <typename acc_t>
DD_HD acc_t sample_gradient_scale(const WeightedLossParams& p, int64_t b) {
  const acc_t z = load_per_sample<acc_t>(p.z, b);
  const acc_t v = load_per_sample<acc_t>(p.weight, b);
  if (z == 0 || v == 0) return 0;
  return load_per_sample<acc_t>(p.grad_output, b) * v * load_per_sample<acc_t>(p.pred_scale, b) / z /
         reduction_divisor<acc_t>(p);
}

// A sample's share of the result from its numerator: numerator / (Z * n), or numerator / Z for a sum.
template <typename acc_t>
DD_HD acc_t sample_loss(const WeightedLossParams& p, int64_t b, acc_t numerator) {
  const acc_t z = load_per_sample<acc_t>(p.z, b);
  if (z == 0) return 0;
  return p.reduction == kSum ? numerator / z : numerator / z / acc_t(p.count);
}

// False where a sample's v is 0: it is left out, forward and backward.
template <typename acc_t>
DD_HD bool sample_selected(const WeightedLossParams& p, int64_t b) {
  return load_per_sample<acc_t>(p.weight, b) != 0;
}

}  // namespace diffdoctor
