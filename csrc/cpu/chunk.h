// The arithmetic over one block: residual, element losses, numerator, gradient. All loops are over buffers of at most
// kChunk elements; partial sums have a fixed order.
#pragma once

#include "common/losses.h"
#include "cpu/blocks.h"
#include "cpu/vector_math.h"

namespace diffdoctor {
namespace {

// The spatial weight omega and the modulated weight omega * m of a block, reused by every channel. `modulated` is
// filled only where m is not 1, `u` only for LossStats.
template <typename acc_t>
struct Weights {
  acc_t u[kChunk], mask[kChunk], omega[kChunk], modulated[kChunk];
};

inline bool modulates(const WeightedLossParams& p) { return p.artifact_grad != 1 || p.clean_grad != 1; }

template <bool kMask, bool kModulated, typename acc_t>
void combine_weights(const WeightedLossParams& p, const acc_t* c, acc_t threshold, int64_t n, bool keep_level,
                     Weights<acc_t>& w) {
  const acc_t base = acc_t(p.clean_weight), slope = acc_t(p.artifact_weight - p.clean_weight);
  const acc_t m_base = acc_t(p.clean_grad), m_slope = acc_t(p.artifact_grad - p.clean_grad);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t u = c[i] >= threshold ? c[i] : acc_t(0);
    const acc_t weight = base + slope * u;
    const acc_t omega = kMask ? w.mask[i] * weight : weight;
    w.omega[i] = omega;
    if (kModulated) {
      const acc_t m = m_base + m_slope * u;
      w.modulated[i] = omega == 0 || m == 0 ? acc_t(0) : omega * m;
    }
  }
  if (keep_level)
    for (int64_t i = 0; i < n; ++i) w.u[i] = c[i] >= threshold ? c[i] : acc_t(0);
}

template <typename acc_t>
void fill_weights(const WeightedLossParams& p, const Tiling& t, const Place& at, Weights<acc_t>& w) {
  const int64_t n = at.count;
  const acc_t* c = w.u;
  acc_t threshold = acc_t(p.threshold);
  if (p.confidence.mode == kAbsent) {
    for (int64_t i = 0; i < n; ++i) w.u[i] = 0;
  } else if (p.confidence.mode == kSame && p.gamma == 1 && p.confidence.dtype == kAccDtype<acc_t> &&
             block_is_run(p, t, p.confidence.stride)) {
    c = static_cast<const acc_t*>(p.confidence.data) +
        block_offset(t, at, p.confidence.batch_stride, p.confidence.stride);
  } else {
    gather_map(p, t, at, p.confidence, w.u);
    if (p.gamma != 1) {
      for (int64_t i = 0; i < n; ++i) w.u[i] = artifact_level<acc_t>(p, w.u[i]);
      threshold = 0;  // it compares with c, not with c^gamma
    }
  }
  const bool keep_level = (p.work & kWriteSums) != 0;
  const bool mask = p.mask.mode != kAbsent, modulated = modulates(p);
  if (mask) gather_map(p, t, at, p.mask, w.mask);
  if (mask && modulated)
    combine_weights<true, true>(p, c, threshold, n, keep_level, w);
  else if (mask)
    combine_weights<true, false>(p, c, threshold, n, keep_level, w);
  else if (modulated)
    combine_weights<false, true>(p, c, threshold, n, keep_level, w);
  else
    combine_weights<false, false>(p, c, threshold, n, keep_level, w);
}

// Numbers of one sample.
template <typename acc_t>
struct Sample {
  acc_t pred_scale, coef[kMaxTerms], huber_c, weight, gradient_scale;
};

// l2 in one pass. kWeights: omega is an array, else 1. kModulated: so is omega * m, else it is omega.
template <bool kWeights, bool kModulated, bool kGrad, typename pred_t, typename term_t, typename acc_t>
acc_t l2_chunk(const pred_t* pred, const term_t* target, const acc_t* weight, const acc_t* modulated, acc_t pred_scale,
               acc_t loss_scale, acc_t grad_scale, int64_t n, pred_t* grad) {
  acc_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    acc_t d = pred_scale * to_acc(pred[i]) - to_acc(target[i]);
    acc_t weighted = d;
    if (kWeights) {
      d = weight[i] == 0 ? acc_t(0) : d;  // selected out: a NaN must not come through
      weighted = weight[i] * d;
    }
    total += weighted * d;
    if (kGrad) {
      acc_t slope = weighted;
      if (kModulated) slope = modulated[i] == 0 ? acc_t(0) : modulated[i] * d;
      from_acc(slope * grad_scale, grad + i);
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
  add_loss(p.strength[kLogCosh], d, n, loss, slope, [](acc_t x, acc_t& l, acc_t& s) { log_cosh_run(x, l, s); });
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
