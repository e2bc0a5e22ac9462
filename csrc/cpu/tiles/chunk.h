// The arithmetic over one block: weights, residual, element losses, numerator, gradient. Partial sums have a fixed
// order.
#pragma once

#include <type_traits>

#include "common/losses.h"
#include "cpu/tiles/map_rows.h"
#include "cpu/vector_math.h"

namespace diffdoctor {
namespace {

// The spatial weight omega and the modulated weight omega * m of a block, reused by every channel. `modulated` is
// filled only where m is not 1; `u` only for LossStats and coefficients that change with it; `nan` and `outside`, of
// the sums' columns, only for LossStats.
template <typename acc_t>
struct alignas(64) Weights {
  acc_t u[kChunk], mask[kChunk], omega[kChunk], modulated[kChunk];
  MapScratch<acc_t> scratch;
  double nan, outside;
};

inline bool modulates(const WeightedLossParams& p) { return p.artifact_grad != 1 || p.clean_grad != 1; }

template <bool kMask, bool kModulated, bool kKeepLevel, typename acc_t>
void combine_weights(const WeightedLossParams& p, const acc_t* c, acc_t threshold, int64_t n, Weights<acc_t>& w) {
  const Line<acc_t> weight_of = spatial_weight<acc_t>(p), m_of = gradient_weight<acc_t>(p);
  DD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const acc_t u = c[i] >= threshold ? at_most_one(c[i]) : acc_t(0);
    const acc_t weight = at_level(weight_of, u);
    const acc_t omega = kMask ? vector_region(w.mask[i]) * weight : weight;
    w.omega[i] = omega;
    if (kKeepLevel) w.u[i] = u;
    if (kModulated) {
      const acc_t m = at_level(m_of, u);
      w.modulated[i] = omega == 0 || m == 0 ? acc_t(0) : omega * m;
    }
  }
}

// c, mask: null where absent.
template <typename acc_t>
void count_values(const acc_t* c, const acc_t* mask, int64_t n, Weights<acc_t>& w) {
  w.nan = w.outside = 0;
  for (int64_t i = 0; i < n; ++i) {
    const acc_t level = c ? c[i] : acc_t(0), k = mask ? mask[i] : acc_t(0);
    w.nan += level != level || k != k;
    w.outside += is_outside(level) || is_outside(k);
  }
}

template <typename acc_t>
void fill_weights(const WeightedLossParams& p, const Tiling& t, const Block& at, Weights<acc_t>& w) {
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
    gather_map(p, t, at, p.confidence, w.scratch, w.u);
  }
  const bool keep_level = (p.outputs & kWriteSums) != 0 || p.spatial_coefs != 0;
  const bool mask = p.mask.mode != kAbsent, modulated = modulates(p);
  if (mask) gather_map(p, t, at, p.mask, w.scratch, w.mask);
  if (p.outputs & kWriteSums) count_values(p.confidence.mode == kAbsent ? nullptr : c, mask ? w.mask : nullptr, n, w);
  if (p.confidence.mode != kAbsent && p.gamma != 1) {
    for (int64_t i = 0; i < n; ++i) w.u[i] = artifact_level<acc_t>(p, w.u[i]);
    threshold = 0;  // it compares with c, not with c^gamma
  }
  const auto combine = [&](auto with_mask, auto with_modulated) {
    constexpr bool kMask = decltype(with_mask)::value, kModulated = decltype(with_modulated)::value;
    keep_level ? combine_weights<kMask, kModulated, true>(p, c, threshold, n, w)
               : combine_weights<kMask, kModulated, false>(p, c, threshold, n, w);
  };
  if (mask)
    modulated ? combine(std::true_type(), std::true_type()) : combine(std::true_type(), std::false_type());
  else
    modulated ? combine(std::false_type(), std::true_type()) : combine(std::false_type(), std::false_type());
}

// Numbers of one sample.
template <typename acc_t>
struct Sample {
  acc_t pred_scale, huber_c, weight, gradient_scale;
  Line<acc_t> coef[kMaxTerms];
};

// The element-wise numbers of a block: omega * v and omega * m * v, null where they are constant over the call, and u
// where the coefficients change with it.
template <typename acc_t>
struct BlockWeights {
  const acc_t *weight, *modulated, *level;

  BlockWeights from(int64_t begin) const {
    return {weight ? weight + begin : nullptr, weight ? modulated + begin : nullptr, level ? level + begin : nullptr};
  }
};

// The residual's parts over a run: d = pred_scale * pred - coef[0] * term[0] - ...
template <typename pred_t, typename term_t>
struct Operands {
  const pred_t* pred;
  const term_t* term[kMaxTerms];
  pred_t* grad;
};

// How many terms, and whether their coefficients change with u: known at compile time.
template <int kTermCount, bool kCoefsChange>
struct TermShape {
  static constexpr int kTerms = kTermCount;
  static constexpr bool kSpatial = kCoefsChange;
};

template <typename shape_t, typename pred_t, typename term_t, typename acc_t>
inline acc_t residual(const Operands<pred_t, term_t>& x, const Sample<acc_t>& s, const acc_t* level, int64_t i) {
  const auto coef = [&](int k) { return shape_t::kSpatial ? at_level(s.coef[k], level[i]) : s.coef[k].clean; };
  acc_t d = s.pred_scale * to_acc(x.pred[i]);
  if (shape_t::kTerms > 0) d -= coef(0) * to_acc(x.term[0][i]);
  if (shape_t::kTerms > 1) d -= coef(1) * to_acc(x.term[1][i]);
  if (shape_t::kTerms > 2) d -= coef(2) * to_acc(x.term[2][i]);
  return d;
}

template <bool kFirst, typename acc_t, typename loss_t>
void add_loss(acc_t strength, const acc_t* d, int64_t n, acc_t* loss, acc_t* slope, loss_t element) {
  DD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    acc_t l, k;
    element(d[i], l, k);
    loss[i] = kFirst ? strength * l : loss[i] + strength * l;
    slope[i] = kFirst ? strength * k : slope[i] + strength * k;
  }
}

// Any mixture of element losses of the residuals d, one vectorised pass for each.
template <typename acc_t>
void eval_losses(const WeightedLossParams& p, const acc_t* d, acc_t c, int64_t n, acc_t* loss, acc_t* slope) {
  bool first = true;
  for_each_loss([&](auto tag) {
    const acc_t strength = acc_t(p.strength[tag.kind]);
    if (p.strength[tag.kind] == 0) return;
    const auto element = [tag, c](acc_t x, acc_t& l, acc_t& s) { vector_loss(tag, x, c, l, s); };
    if (first)
      add_loss<true>(strength, d, n, loss, slope, element);
    else
      add_loss<false>(strength, d, n, loss, slope, element);
    first = false;
  });
  for (int64_t i = 0; first && i < n; ++i) loss[i] = slope[i] = 0;
}

// Not inlined: among other loops its sum would be kept in memory.
template <typename acc_t>
DD_NOINLINE acc_t weighted_sum(const acc_t* weight, const acc_t* loss, int64_t n) {
  acc_t sum = 0;
  DD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i) sum += weight[i] == 0 ? acc_t(0) : weight[i] * loss[i];
  return sum;
}

template <typename acc_t>
void scale_slopes(const acc_t* modulated, const acc_t* slope, acc_t scale, int64_t n, acc_t* out) {
  DD_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = modulated[i] == 0 ? acc_t(0) : modulated[i] * slope[i] * scale;
}

}  // namespace
}  // namespace diffdoctor
