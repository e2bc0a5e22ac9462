// The arithmetic over one block: residual, element losses, numerator, gradient. All loops are over buffers of at most
// kChunk elements; partial sums have a fixed order.
#pragma once

#include "common/losses.h"
#include "cpu/blocks.h"

namespace diffdoctor {
namespace {

// The spatial weight omega and the modulated weight omega * m of a block, reused by every channel.
template <typename acc_t>
struct Weights {
  acc_t u[kChunk], omega[kChunk], modulated[kChunk];
};

template <typename acc_t>
void fill_weights(const WeightedLossParams& p, const Tiling& t, const Place& at, Weights<acc_t>& w) {
  const int64_t n = at.count;
  const acc_t base = acc_t(p.clean_weight), slope = acc_t(p.artifact_weight - p.clean_weight);
  const acc_t m_base = acc_t(p.clean_grad), m_slope = acc_t(p.artifact_grad - p.clean_grad);
  if (p.confidence.mode == kAbsent) {
    for (int64_t i = 0; i < n; ++i) w.u[i] = 0;
  } else {
    gather_map(p, t, at, p.confidence, w.u);
    const acc_t threshold = acc_t(p.threshold);
    if (p.gamma == 1) {
      for (int64_t i = 0; i < n; ++i) w.u[i] = w.u[i] >= threshold ? w.u[i] : acc_t(0);
    } else {
      for (int64_t i = 0; i < n; ++i) w.u[i] = artifact_level<acc_t>(p, w.u[i]);
    }
  }
  if (p.mask.mode == kAbsent) {
    for (int64_t i = 0; i < n; ++i) w.omega[i] = base + slope * w.u[i];
  } else {
    gather_map(p, t, at, p.mask, w.omega);
    for (int64_t i = 0; i < n; ++i) w.omega[i] = w.omega[i] * (base + slope * w.u[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const acc_t m = m_base + m_slope * w.u[i];
    w.modulated[i] = w.omega[i] == 0 || m == 0 ? acc_t(0) : w.omega[i] * m;
  }
}

// Numbers of one sample.
template <typename acc_t>
struct Sample {
  acc_t pred_scale, coef[kMaxTerms], huber_c, weight, gradient_scale;
};

// l2 in one pass. weight and modulated may be null: then they are 1 and the constants below apply.
template <bool kWeights, bool kGrad, typename pred_t, typename term_t, typename acc_t>
acc_t l2_chunk(const pred_t* pred, const term_t* target, const acc_t* weight, const acc_t* modulated, acc_t pred_scale,
               acc_t loss_scale, acc_t grad_scale, int64_t n, pred_t* grad) {
  acc_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t d = pred_scale * to_acc(pred[i]) - to_acc(target[i]);
    const acc_t w = kWeights ? weight[i] : acc_t(1);
    const acc_t loss = w * d * d;
    total += w == 0 ? acc_t(0) : loss;
    if (kGrad) {
      const acc_t g = kWeights ? modulated[i] : acc_t(1);
      const acc_t slope = g * d * grad_scale;
      from_acc(g == 0 ? acc_t(0) : slope, grad + i);
    }
  }
  return total * loss_scale;
}

template <typename acc_t, typename loss_t>
void add_loss(double strength, const acc_t* d, int64_t n, acc_t* loss, acc_t* slope, loss_t element) {
  if (strength == 0) return;
  const acc_t s = acc_t(strength);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    acc_t l, k;
    element(d[i], l, k);
    loss[i] += s * l;
    slope[i] += s * k;
  }
}

// Any mixture of element losses of the residuals d, one vectorised pass for each.
template <typename acc_t>
void mixture(const WeightedLossParams& p, const acc_t* d, acc_t c, int64_t n, acc_t* loss, acc_t* slope) {
  for (int64_t i = 0; i < n; ++i) loss[i] = slope[i] = 0;
  add_loss(p.strength[kL2], d, n, loss, slope, [](acc_t x, acc_t& l, acc_t& s) { l2_loss(x, l, s); });
  add_loss(p.strength[kL1], d, n, loss, slope, [](acc_t x, acc_t& l, acc_t& s) { l1_loss(x, l, s); });
  add_loss(p.strength[kHuber], d, n, loss, slope, [c](acc_t x, acc_t& l, acc_t& s) { huber_loss(x, c, l, s); });
  add_loss(p.strength[kSmoothL1], d, n, loss, slope, [c](acc_t x, acc_t& l, acc_t& s) { smooth_l1_loss(x, c, l, s); });
  add_loss(p.strength[kPseudoHuber], d, n, loss, slope,
           [c](acc_t x, acc_t& l, acc_t& s) { pseudo_huber_loss(x, c, l, s); });
  if (p.strength[kLogCosh] == 0) return;
  const acc_t s = acc_t(p.strength[kLogCosh]);
  for (int64_t i = 0; i < n; ++i) {
    acc_t l, k;
    log_cosh_loss(d[i], l, k);
    loss[i] += s * l;
    slope[i] += s * k;
  }
}

// Adds a block's share of the sums behind LossStats.
template <typename acc_t>
void add_sums(const acc_t* u, const acc_t* omega, const acc_t* weight, const acc_t* loss, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    const double level = u[i];
    sums[kSumWeight] += omega[i];
    sums[kSumArtifact] += level;
    if (weight[i] == 0) continue;
    const double l = loss[i], weighted = weight[i] * loss[i];
    sums[kSumNumerator] += weighted;
    sums[kSumArtifactWeight] += level;
    sums[kSumCleanWeight] += 1 - level;
    if (level != 0) sums[kSumArtifactLoss] += level * l;
    if (level != 1) sums[kSumCleanLoss] += (1 - level) * l;
    if (!(weighted - weighted == 0)) sums[kSumNonfinite] += 1;
  }
}

}  // namespace
}  // namespace diffdoctor
