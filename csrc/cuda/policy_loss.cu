// policy_loss where policy_lanes.cu does not serve: a thread for a few pixels that lie next to each other. It goes over
// their channels twice: for the sums from which the ratios follow, and for the gradients, when the cache still holds
// what it read. Level "sample" takes a launch before, which adds up what the samples' ratios are made of.
#include <cuda_runtime.h>

#include "common/policy_loss.h"
#include "cuda/launch.cuh"
#include "cuda/policy_lanes.h"
#include "cuda/policy_loss.h"
#include "cuda/policy_sums.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda {
namespace {

struct Blocks {
  int64_t pixels, inner, per_sample;  // of a sample; behind the channels; blocks of a sample
  int32_t narrow;
};

// Pixels of a thread: 8 bytes of a two-byte type, 16 of others.
constexpr int pixel_width(int32_t dtype) { return dtype == kFloat64 ? 2 : 4; }

Blocks blocks_of(const PolicyLossParams& p, int width) {
  Blocks t{p.grid.count / p.channels(), 1, 0, p.grid.count < (int64_t{1} << 31)};
  for (int d = p.channel_dim + 1; d < kMaxDims; ++d) t.inner *= p.grid.size[d];
  if (p.channels() == 1) t.inner = t.pixels;
  t.per_sample = ceil_div(t.pixels, int64_t{kThreads} * width);
  return t;
}

// An operand's first of N elements, and how far its next channel is.
struct Place {
  int64_t at, step;

  __device__ __forceinline__ Place(const Operand& x, int64_t b, int32_t channel_dim)
      : at(b * x.batch_stride), step(x.stride[channel_dim]) {}
};

template <typename acc_t, int N>
__device__ __forceinline__ void load_values(const Operand& x, const Place& place, int64_t channel, acc_t (&value)[N]) {
  const Raw<acc_t, N> raw = load_raw<acc_t, N>(x.data, x.dtype, place.at + channel * place.step);
  unpack<acc_t, N>(raw, 0, x.dtype, value);
}

// What is the same for all channels of a thread's pixels.
template <typename acc_t, int N>
struct Pixels {
  Place pred, grad, latents, next_latents, ref_pred;
  int64_t log_prob[N];
  acc_t k[N], given[N];

  __device__ __forceinline__ Pixels(const PolicyLossParams& p, const Blocks& t, int64_t b, int64_t first, int count)
      : pred(p.grid.pred, b, p.channel_dim),
        grad(p.grid.grad, b, p.channel_dim),
        latents(p.grid.terms[0], b, p.channel_dim),
        next_latents(p.grid.terms[1], b, p.channel_dim),
        ref_pred(p.grid.terms[2], b, p.channel_dim) {
    const WeightedLossParams& grid = p.grid;
    const int64_t channels = grid.size[p.channel_dim];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      log_prob[j] = b * grid.weighting.batch_stride;
      k[j] = given[j] = 0;
      if (j >= count) continue;
      const int64_t o = (first + j) / t.inner;
      const int64_t element = o * channels * t.inner + (first + j - o * t.inner);
      int64_t advantage = 0, mask = 0, at[3] = {0, 0, 0};
      decode(grid, t.narrow != 0, element, [&](int d, int64_t index) {
        log_prob[j] += index * grid.weighting.stride[d];
        advantage += index * grid.confidence.stride[d];
        mask += index * grid.mask.stride[d];
        at[0] += index * grid.coord[0][d];
        at[1] += index * grid.coord[1][d];
        at[2] += index * grid.coord[2][d];
        if (j != 0) return;
        pred.at += index * grid.pred.stride[d];
        grad.at += index * grid.grad.stride[d];
        latents.at += index * grid.terms[0].stride[d];
        next_latents.at += index * grid.terms[1].stride[d];
        ref_pred.at += index * grid.terms[2].stride[d];
      });
      if (grid.confidence.mode == kAbsent) continue;
      k[j] = region(map_value<acc_t>(grid, grid.mask, b, mask, at, 1));
      given[j] = map_value<acc_t>(grid, grid.confidence, b, advantage, at, 0);
    }
  }
};

// next_latents - mu, and model_pred - ref_pred.
template <typename acc_t, int N>
__device__ __forceinline__ void load_channel(const PolicyLossParams& p, const PolicyStep<acc_t>& s,
                                             const Pixels<acc_t, N>& x, int64_t channel, acc_t (&d)[N],
                                             acc_t (&away)[N]) {
  acc_t pred[N], latents[N];
  load_values<acc_t, N>(p.grid.pred, x.pred, channel, pred);
  load_values<acc_t, N>(p.grid.terms[0], x.latents, channel, latents);
  load_values<acc_t, N>(p.grid.terms[1], x.next_latents, channel, d);
#pragma unroll
  for (int j = 0; j < N; ++j) d[j] = d[j] - s.a * latents[j] - s.b * pred[j];
  if (p.grid.num_terms <= 2) return;
  load_values<acc_t, N>(p.grid.terms[2], x.ref_pred, channel, away);
#pragma unroll
  for (int j = 0; j < N; ++j) away[j] = pred[j] - away[j];
}

template <int32_t kDtype, int N>
__global__ void __launch_bounds__(kThreads, 2)
    policy_loss_kernel(const __grid_constant__ PolicyLossParams p, const __grid_constant__ Blocks t, int32_t stage,
                       void* workspace) {
  using acc_t = std::conditional_t<kDtype == kFloat64, double, float>;
  const PolicyResult result(p, t.per_sample);
  acc_t* partials = workspace_body<acc_t>(workspace, p.grid.batch);
  double* all_moments = moments_in(partials, result);
  const int64_t b = blockIdx.x / t.per_sample, channels = p.grid.size[p.channel_dim];
  const int64_t first = ((blockIdx.x - b * t.per_sample) * kThreads + threadIdx.x) * N;
  const int count = first >= t.pixels ? 0 : t.pixels - first < N ? static_cast<int>(t.pixels - first) : N;
  const PolicyStep<acc_t> s = policy_step<acc_t>(p, p.grid.batch, t.pixels, b);
  const Pixels<acc_t, N> x(p, t, b, first, count);

  acc_t sum[N] = {}, kl[N] = {}, d[N], away[N] = {};
  if (count > 0) {
#pragma unroll 2
    for (int64_t c = 0; c < channels; ++c) {
      load_channel<acc_t, N>(p, s, x, c, d, away);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[j] += d[j] * d[j];
        kl[j] += away[j] * away[j];
      }
    }
  }
  if (stage == kLogProbs) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= count) break;
      const acc_t value = s.inverse == 0 ? acc_t(0) : s.log_prob * sum[j];
      static_cast<acc_t*>(p.grid.weighting.data)[x.log_prob[j]] = value;
    }
    return;
  }
  acc_t k[N], change[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    k[j] = j < count && s.inverse != 0 ? x.k[j] : acc_t(0);
    const acc_t now = s.log_prob * sum[j];
    acc_t old = p.old == kOldIsNew ? now : s.old_mean;
    if (p.old == kOldPerPixel && j < count)
      old = load_element<acc_t>(p.grid.weighting.data, p.grid.weighting.dtype, x.log_prob[j]);
    change[j] = now - old;
  }
  if (stage == kMoments) {
    acc_t advantage[N], moments[kPolicyMoments] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) advantage[j] = bounded_advantage(x.given[j], s.most);
    add_moments(k, advantage, change, moments);
    finish_moments(result, b, blockIdx.x, moments, workspace, partials, all_moments);
    return;
  }
  SampleRatio<acc_t> sample{};
  if (stage == kSamples) sample = load_sample_ratio<acc_t>(all_moments, b, s.low, s.high);
  acc_t sums[kColumns] = {};
  Slopes<acc_t, N> slopes;
  const auto add = [&](int column, acc_t value) {
    sums[column] = column != kAdded ? sums[column] + value : value > sums[column] ? value : sums[column];
  };
  sums[kLoss] = weigh_pixels(s, stage == kSamples, sample, p.grid.num_terms > 2, (p.outputs & kWriteSums) != 0, k,
                             x.given, change, kl, slopes, add);
  if ((p.outputs & kWriteGrad) && count > 0) {
#pragma unroll 2
    for (int64_t c = 0; c < channels; ++c) {
      load_channel<acc_t, N>(p, s, x, c, d, away);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        d[j] = slopes.policy[j] == 0 ? acc_t(0) : slopes.policy[j] * d[j];
        if (slopes.kl[j] != 0) d[j] += slopes.kl[j] * away[j];
      }
      Packed<kDtype, N> packed;
      pack<kDtype, acc_t, N>(d, 0, packed);
      store_packed<kDtype, N>(p.grid.grad.data, x.grad.at + c * x.grad.step, packed);
    }
  }
  if (!(p.outputs & (kWriteLoss | kWriteSums))) return;
  finish(result, b, blockIdx.x, sums, workspace, partials);
}

// Whether N pixels lie side by side in every operand, N elements from an aligned address.
bool can_vectorise(const PolicyLossParams& p, const Blocks& t, int width) {
  const auto aligned = [&](const Operand& x) { return is_aligned(x, p.grid.batch, width); };
  bool all = p.grid.contiguous && t.inner % width == 0 && aligned(p.grid.pred);
  for (int k = 0; k < p.grid.num_terms; ++k) all = all && aligned(p.grid.terms[k]);
  return all && (!(p.outputs & kWriteGrad) || aligned(p.grid.grad));
}

template <int32_t kDtype, int N>
const char* launch_stages(const PolicyLossParams& p, void* workspace, void* stream) {
  const Blocks t = blocks_of(p, N);
  const int64_t blocks = p.grid.batch * t.per_sample;
  const auto run = [&](int32_t stage) {
    return launch<policy_loss_kernel<kDtype, N>>(blocks, stream, p, t, stage, workspace);
  };
  if (p.outputs & kWriteLogProb) return run(kLogProbs);
  if (p.level == kPixelLevel) return run(kPixels);
  const char* error = run(kMoments);
  return error != nullptr ? error : run(kSamples);
}

template <int32_t kDtype>
const char* launch_for(const PolicyLossParams& p, void* workspace, void* stream) {
  constexpr int kWidth = pixel_width(kDtype);
  return can_vectorise(p, blocks_of(p, kWidth), kWidth) ? launch_stages<kDtype, kWidth>(p, workspace, stream)
                                                        : launch_stages<kDtype, 1>(p, workspace, stream);
}

}  // namespace

int64_t policy_loss_workspace(const PolicyLossParams& p) {
  const int64_t bytes = p.grid.dtype == kFloat64 ? 8 : 4, blocks = p.grid.batch * blocks_of(p, 1).per_sample;
  return workspace_bytes(p.grid.batch, blocks * kColumns + 1, bytes) + p.grid.batch * kPolicyMoments * 8;
}

const char* launch_policy_loss(const PolicyLossParams& p, void* workspace, void* stream) {
  if (policy_lanes_serve(p)) return launch_policy_lanes(p, workspace, stream);
  return for_dtype(p.grid.dtype, [&](auto dtype) { return launch_for<dtype>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
