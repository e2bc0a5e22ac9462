// What policy_loss is told.
#pragma once

#include <cstdint>

#include "common/weighted_loss_params.h"

namespace diffdoctor {

// A bit of `outputs` beside those of Output: each pixel's log-probability.
constexpr int32_t kWriteLogProb = 8;

enum PolicyLevel : int32_t { kPixelLevel = 0, kSampleLevel = 1 };

// Where the old log-probability comes from.
enum OldLogProb : int32_t { kOldIsNew = 0, kOldPerSample = 1, kOldPerPixel = 2 };

// Columns of `sums` (batch, 6), in the accumulation type. A pixel is counted where its mask and its sigma are not 0.
enum PolicySum : int32_t {
  kPolicyCounted = 0,
  kPolicyRatio = 1,
  kPolicyLargest = 2,  // ratio that is not NaN, at least 0
  kPolicyClipped = 3,
  kPolicyKl = 4,
  kPolicyNonfinite = 5,
  kPolicySums = 6,
};

// The names and types of ArgumentsOfPolicy in diffdoctor/backends/native_call.py, in its order.
//   channel_dim     of the plan's dims, that of the channels; where there is one channel, any of size 1
//   clip_low        below 1, clip_high above 1: how far a ratio counts
//   advantage_clip  infinity for none
//   old             an OldLogProb
#define DD_POLICY_LOSS_PARAMS(X) \
  X(int32_t, outputs)            \
  X(int32_t, reduction)          \
  X(int32_t, level)              \
  X(int32_t, channel_dim)        \
  X(int32_t, old)                \
  X(double, clip_low)            \
  X(double, clip_high)           \
  X(double, advantage_clip)      \
  X(double, kl_weight)           \
  X(PerSample, a)                \
  X(PerSample, b)                \
  X(PerSample, sigma)            \
  X(PerSample, old_mean)         \
  X(PerSample, grad_output)      \
  X(const void*, pred)           \
  X(void*, grad)                 \
  X(const void*, latents)        \
  X(const void*, next_latents)   \
  X(const void*, ref_pred)       \
  X(void*, log_prob)             \
  X(const void*, advantage)      \
  X(const void*, mask)           \
  X(void*, loss)                 \
  X(void*, sums)

struct PolicyLossParams {
  // The iteration space of a sample's elements. terms: latents, next_latents and, where there is one, ref_pred;
  // weighting: the log-probability, old or to be written; confidence: the advantage.
  WeightedLossParams grid;
  DD_POLICY_LOSS_PARAMS(DD_FIELD)

  int64_t channels() const { return grid.size[channel_dim]; }
  bool has_ref() const { return grid.num_terms > 2; }
};

}  // namespace diffdoctor
