// The channels of a block of pixels for policy_loss: their sums of squares, and their gradients. Two layouts are read in
// place: runs of pixels, a channel after the other, and rows that hold the channels of few pixels (channels_last, tokens).
#pragma once

#include "common/policy_loss.h"
#include "cpu/convert.h"

namespace diffdoctor {
namespace {

// n elements of a run of pixels, or rows of channels, one after another in memory.
template <typename pred_t, typename term_t>
struct ChannelOperands {
  const pred_t* pred;
  const term_t *latents, *next_latents, *ref_pred;  // ref_pred: null where there is none
  pred_t* grad;
};

template <typename acc_t, typename pred_t, typename term_t>
acc_t drawn_residual(const ChannelOperands<pred_t, term_t>& x, acc_t a, acc_t b, int64_t i) {
  return as<acc_t, term_t>(x.next_latents[i]) - a * as<acc_t, term_t>(x.latents[i]) - b * as<acc_t, pred_t>(x.pred[i]);
}

template <typename acc_t, typename pred_t, typename term_t>
acc_t ref_difference(const ChannelOperands<pred_t, term_t>& x, int64_t i) {
  return as<acc_t, pred_t>(x.pred[i]) - as<acc_t, term_t>(x.ref_pred[i]);
}

// Adds a channel of n pixels to their sums.
template <typename acc_t, typename pred_t, typename term_t>
DD_NOINLINE void add_channel(const ChannelOperands<pred_t, term_t> x, acc_t a, acc_t b, int64_t n, acc_t* sum,
                             acc_t* kl) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t d = drawn_residual(x, a, b, i);
    sum[i] += d * d;
  }
  if (!x.ref_pred) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t d = ref_difference<acc_t>(x, i);
    kl[i] += d * d;
  }
}

// slope, kl_slope: of the pixels; 0 leaves the element out, whatever it holds. kl_slope is null without a ref_pred.
template <bool kKl, typename acc_t, typename pred_t, typename term_t>
DD_NOINLINE void write_channel(const ChannelOperands<pred_t, term_t> x, acc_t a, acc_t b, int64_t n, const acc_t* slope,
                               const acc_t* kl_slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t d = drawn_residual(x, a, b, i);
    acc_t grad = slope[i] == 0 ? acc_t(0) : slope[i] * d;
    if (kKl) {
      const acc_t away = ref_difference<acc_t>(x, i);
      grad += kl_slope[i] == 0 ? acc_t(0) : kl_slope[i] * away;
    }
    from_acc(grad, x.grad + i);
  }
}

// Lanes in which a row of channels is gone through where the pixels of a row divide them.
constexpr int kLanes = 16;

inline bool rows_in_lanes(int64_t channels, int64_t inner) {
  return inner <= kLanes && kLanes % inner == 0 && channels * inner % kLanes == 0;
}

// Rows of `channels` times `inner` pixels: adds the channels of each pixel to its sum.
template <typename acc_t, typename pred_t, typename term_t>
DD_NOINLINE void add_rows(const ChannelOperands<pred_t, term_t> x, acc_t a, acc_t b, int64_t rows, int64_t channels,
                          int64_t inner, acc_t* sum, acc_t* kl) {
  const int64_t length = channels * inner;
  const auto add = [&](acc_t* to, auto element) {
    if (!rows_in_lanes(channels, inner)) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t j = 0; j < inner; ++j) {
            const acc_t d = element(r * length + c * inner + j);
            to[r * inner + j] += d * d;
          }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      acc_t lanes[kLanes] = {};
      for (int64_t i = r * length; i < (r + 1) * length; i += kLanes) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
          const acc_t d = element(i + lane);
          lanes[lane] += d * d;
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) to[r * inner + lane % inner] += lanes[lane];
    }
  };
  add(sum, [=](int64_t i) { return drawn_residual(x, a, b, i); });
  if (x.ref_pred) add(kl, [=](int64_t i) { return ref_difference<acc_t>(x, i); });
}

template <bool kKl, typename acc_t, typename pred_t, typename term_t>
DD_NOINLINE void write_rows(const ChannelOperands<pred_t, term_t> x, acc_t a, acc_t b, int64_t rows, int64_t channels,
                            int64_t inner, const acc_t* slope, const acc_t* kl_slope) {
  const int64_t length = channels * inner;
  const auto write = [=](int64_t i, acc_t factor, acc_t kl_factor) {
    const acc_t d = drawn_residual(x, a, b, i);
    acc_t grad = factor == 0 ? acc_t(0) : factor * d;
    if (kKl) {
      const acc_t away = ref_difference<acc_t>(x, i);
      grad += kl_factor == 0 ? acc_t(0) : kl_factor * away;
    }
    from_acc(grad, x.grad + i);
  };
  const bool in_lanes = rows_in_lanes(channels, inner);
  for (int64_t r = 0; r < rows; ++r) {
    const acc_t *factor = slope + r * inner, *kl_factor = kKl ? kl_slope + r * inner : slope;
    if (!in_lanes) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < inner; ++j) write(r * length + c * inner + j, factor[j], kl_factor[j]);
      continue;
    }
    acc_t factors[kLanes], kl_factors[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      factors[lane] = factor[lane % inner];
      kl_factors[lane] = kl_factor[lane % inner];
    }
    for (int64_t i = r * length; i < (r + 1) * length; i += kLanes) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) write(i + lane, factors[lane], kl_factors[lane]);
    }
  }
}

}  // namespace
}  // namespace diffdoctor
