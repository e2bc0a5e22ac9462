// The channels of a block of pixels for policy_loss: residuals kept from a first pass, their sums of squares by pixel,
// and the gradient made of them in a second. A pixel's channels lie a block's run of pixels apart, or in rows that hold
// the channels of few pixels (channels_last, tokens).
#pragma once

#include "common/policy_loss.h"
#include "cpu/convert.h"

namespace diffdoctor {
namespace {

// A run of elements of each operand.
template <typename pred_t, typename term_t>
struct StepOperands {
  const pred_t* pred;
  const term_t *latents, *next_latents, *ref_pred;  // ref_pred: null where there is none
};

// Elements between prefetches, and how far ahead these are: the hardware's prefetcher starts anew at each page, which
// is a channel's run of bf16. Past its end lies what the next block reads of the same channel.
constexpr int64_t kStrip = 32;
constexpr int64_t kAheadBytes = 1536;

template <typename storage_t>
const char* ahead_of(const storage_t* place) {
  return reinterpret_cast<const char*>(place) + kAheadBytes;
}

// ask(i) before every kStrip elements, body(i) for each of n.
template <typename ask_t, typename body_t>
inline void for_strips(int64_t n, const ask_t& ask, const body_t& body) {
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ask(i);
    DD_SIMD
    for (int64_t k = 0; k < kStrip; ++k) body(i + k);
  }
  for (; i < n; ++i) body(i);
}

// Whether elements of a type are taken in strips: fp32, whose runs are twice as long, takes as long either way.
template <typename storage_t>
constexpr bool kInStrips = sizeof(storage_t) == sizeof(bfloat16);

// Adds the squares of a channel of n pixels to their sums.
template <typename acc_t>
DD_NOINLINE void add_channel(const acc_t* values, int64_t n, acc_t* sum) {
  DD_SIMD
  for (int64_t i = 0; i < n; ++i) sum[i] += values[i] * values[i];
}

// out: of a channel, f(i), whose squares are added to sum[] where there is one.
template <bool kStrips, typename acc_t, typename ask_t, typename body_t>
inline void fill_channel(int64_t n, const ask_t& ask, const body_t& f, acc_t* out, acc_t* sum) {
  if constexpr (!kStrips) {
    DD_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = f(i);
    if (sum) add_channel(out, n, sum);
  } else if (sum) {
    for_strips(n, ask, [=](int64_t i) {
      const acc_t value = f(i);
      out[i] = value;
      sum[i] += value * value;
    });
  } else {
    for_strips(n, ask, [=](int64_t i) { out[i] = f(i); });
  }
}

// d: next_latents - mu. away: model_pred - ref_pred, where there is one. Their squares are added to sum and kl, by
// pixel, unless those are null.
template <typename acc_t, typename pred_t, typename term_t>
DD_NOINLINE void fill_residuals(const StepOperands<pred_t, term_t> x, acc_t a, acc_t b, int64_t n, acc_t* d,
                                acc_t* away, acc_t* sum, acc_t* kl) {
  constexpr bool kStrips = kInStrips<pred_t>;
  const auto ask = [=](int64_t i) {
    prefetch(ahead_of(x.pred + i));
    prefetch(ahead_of(x.latents + i));
    prefetch(ahead_of(x.next_latents + i));
  };
  const auto residual = [=](int64_t i) {
    return as<acc_t, term_t>(x.next_latents[i]) - a * as<acc_t, term_t>(x.latents[i]) -
           b * as<acc_t, pred_t>(x.pred[i]);
  };
  fill_channel<kStrips>(n, ask, residual, d, sum);
  if (!x.ref_pred) return;
  const auto ask_ref = [=](int64_t i) { prefetch(ahead_of(x.ref_pred + i)); };
  const auto difference = [=](int64_t i) { return as<acc_t, pred_t>(x.pred[i]) - as<acc_t, term_t>(x.ref_pred[i]); };
  fill_channel<kStrips>(n, ask_ref, difference, away, kl);
}

// Lanes in which a row of channels is gone through where the pixels of a row divide them.
constexpr int kLanes = 16;

inline bool rows_in_lanes(int64_t channels, int64_t inner) {
  return inner <= kLanes && kLanes % inner == 0 && channels * inner % kLanes == 0;
}

// The same for rows of `channels` times `inner` pixels.
template <typename acc_t>
DD_NOINLINE void add_rows(const acc_t* values, int64_t rows, int64_t channels, int64_t inner, acc_t* sum) {
  const int64_t length = channels * inner;
  const bool in_lanes = rows_in_lanes(channels, inner);
  for (int64_t r = 0; r < rows; ++r, values += length, sum += inner) {
    if (!in_lanes) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < inner; ++j) sum[j] += values[c * inner + j] * values[c * inner + j];
      continue;
    }
    acc_t lanes[kLanes] = {};
    for (int64_t i = 0; i < length; i += kLanes) {
      DD_SIMD
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) sum[lane % inner] += lanes[lane];
  }
}

// factor * value, and 0 where the factor is, whatever the value.
template <typename acc_t>
acc_t selected_product(acc_t factor, acc_t value) {
  return factor == 0 ? acc_t(0) : factor * value;
}

// slope, kl_slope: of the pixels of a channel; away and kl_slope are null where there is no KL divergence.
template <typename acc_t, typename out_t>
DD_NOINLINE void write_channel(const acc_t* d, const acc_t* away, const acc_t* slope, const acc_t* kl_slope, int64_t n,
                               out_t* out) {
  const auto run = [=](const auto& body) {
    if constexpr (kInStrips<out_t>) {
      for_strips(n, [=](int64_t i) { prefetch_to_write(ahead_of(out + i)); }, body);
    } else {
      DD_SIMD
      for (int64_t i = 0; i < n; ++i) body(i);
    }
  };
  if (!away)
    run([=](int64_t i) { from_acc(selected_product(slope[i], d[i]), out + i); });
  else
    run([=](int64_t i) {
      from_acc(selected_product(slope[i], d[i]) + selected_product(kl_slope[i], away[i]), out + i);
    });
}

template <typename acc_t, typename out_t>
DD_NOINLINE void write_rows(const acc_t* d, const acc_t* away, const acc_t* slope, const acc_t* kl_slope, int64_t rows,
                            int64_t channels, int64_t inner, out_t* out) {
  const int64_t length = channels * inner;
  if (!rows_in_lanes(channels, inner)) {
    for (int64_t i = 0; i < rows * length; i += inner) {
      const int64_t pixel = i / length * inner;
      write_channel(d + i, away ? away + i : away, slope + pixel, kl_slope + pixel, inner, out + i);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    acc_t factor[kLanes], kl_factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      factor[lane] = slope[r * inner + lane % inner];
      kl_factor[lane] = kl_slope[r * inner + lane % inner];
    }
    for (int64_t i = r * length; i < (r + 1) * length; i += kLanes) {
      if (away) {
        DD_SIMD
        for (int lane = 0; lane < kLanes; ++lane)
          from_acc(selected_product(factor[lane], d[i + lane]) + selected_product(kl_factor[lane], away[i + lane]),
                   out + i + lane);
      } else {
        DD_SIMD
        for (int lane = 0; lane < kLanes; ++lane) from_acc(selected_product(factor[lane], d[i + lane]), out + i + lane);
      }
    }
  }
}

}  // namespace
}  // namespace diffdoctor
