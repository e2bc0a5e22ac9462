// policy_loss: a thread for a few pixels that lie next to each other. It goes over their channels twice: for the sums
// from which the ratios follow, and for the gradients, when the cache still holds what it read. Level "sample" takes a
// launch before, which adds up what the samples' ratios are made of.
#include <cuda_runtime.h>

#include "common/policy_loss.h"
#include "cuda/launch.cuh"
#include "cuda/policy_loss.h"
#include "cuda/reduce.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda {
namespace {

enum Stage : int32_t { kPixels, kMoments, kSamples, kLogProbs };

// The partial sums of a block: the loss, then those of PolicySum; the largest ratio is the last of them.
enum Column { kLoss, kCounted, kRatio, kClipped, kKl, kNonfinite, kAdded };
constexpr int kColumns = kAdded + 1;

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

// Stores the largest of a block's values, none of them negative, in its row of partial sums.
template <typename acc_t>
__device__ __forceinline__ void store_block_max(acc_t value, acc_t* partials) {
  __shared__ acc_t shared[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const acc_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) value = shared[w] > value ? shared[w] : value;
  partials[static_cast<int64_t>(blockIdx.x) * kColumns + kAdded] = value;
}

template <typename acc_t>
__device__ __forceinline__ void finish(const PolicyLossParams& p, const Blocks& t, int64_t sample, void* workspace,
                                       const acc_t* partials) {
  const bool sums_wanted = (p.outputs & kWriteSums) != 0;
  const double pixels = static_cast<double>(t.pixels);
  const auto emit = [&](int64_t b, const double (&sums)[kColumns]) {
    if (sums_wanted) {
      acc_t* out = static_cast<acc_t*>(p.sums) + b * kPolicySums;
      constexpr int kColumn[kAdded] = {-1, kPolicyCounted, kPolicyRatio, kPolicyClipped, kPolicyKl, kPolicyNonfinite};
#pragma unroll
      for (int c = 1; c < kAdded; ++c) out[kColumn[c]] = static_cast<acc_t>(sums[c]);
      acc_t largest = 0;
      for (int64_t k = 0; k < t.per_sample; ++k) {
        const acc_t other = __ldcg(partials + (b * t.per_sample + k) * kColumns + kAdded);
        largest = other > largest ? other : largest;
      }
      out[kPolicyLargest] = largest;
    }
    const double share = p.reduction == kSum ? sums[kLoss] : sums[kLoss] / pixels;
    if (p.reduction == kSample && (p.outputs & kWriteLoss)) static_cast<acc_t*>(p.loss)[b] = static_cast<acc_t>(share);
    return share;
  };
  double total;
  if (!reduce_samples<kColumns>(workspace, partials, kColumns, p.grid.batch, sample, t.per_sample, total, emit)) return;
  if ((p.outputs & kWriteLoss) && p.reduction != kSample) {
    *static_cast<acc_t*>(p.loss) =
        static_cast<acc_t>(p.reduction == kMean ? total / static_cast<double>(p.grid.batch) : total);
  }
}

template <int32_t kDtype, int N>
__global__ void __launch_bounds__(kThreads, 2)
    policy_loss_kernel(const __grid_constant__ PolicyLossParams p, const __grid_constant__ Blocks t, int32_t stage,
                       void* workspace) {
  using acc_t = std::conditional_t<kDtype == kFloat64, double, float>;
  acc_t* partials = workspace_body<acc_t>(workspace, p.grid.batch);
  double* all_moments = reinterpret_cast<double*>(partials + 2 * ((p.grid.batch * t.per_sample * kColumns + 1) / 2));
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
  acc_t k[N], advantage[N], ratio[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    k[j] = j < count && s.inverse != 0 ? x.k[j] : acc_t(0);
    advantage[j] = bounded_advantage(x.given[j], s.most);
    const acc_t now = s.log_prob * sum[j];
    acc_t old = p.old == kOldIsNew ? now : s.old_mean;
    if (p.old == kOldPerPixel && j < count)
      old = load_element<acc_t>(p.grid.weighting.data, p.grid.weighting.dtype, x.log_prob[j]);
    ratio[j] = now - old;
  }
  if (stage == kMoments) {
    acc_t moments[kPolicyMoments] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (k[j] == 0) continue;
      moments[kMomentChange] += k[j] * ratio[j];
      moments[kMomentWeight] += k[j];
      if (advantage[j] > 0) moments[kMomentPositive] += k[j] * advantage[j];
      if (advantage[j] < 0) moments[kMomentNegative] += k[j] * advantage[j];
    }
    store_block_sums<kPolicyMoments>(moments, partials, kPolicyMoments, 0, blockIdx.x);
    const auto emit = [&](int64_t index, const double (&sums)[kPolicyMoments]) {
#pragma unroll
      for (int c = 0; c < kPolicyMoments; ++c) all_moments[index * kPolicyMoments + c] = sums[c];
      return 0.0;
    };
    double unused;
    reduce_samples<kPolicyMoments>(workspace, partials, kPolicyMoments, p.grid.batch, b, t.per_sample, unused, emit);
    return;
  }
  SampleRatio<acc_t> sample{};
  if (stage == kSamples) {
    double moments[kPolicyMoments];
#pragma unroll
    for (int c = 0; c < kPolicyMoments; ++c) moments[c] = all_moments[b * kPolicyMoments + c];
    sample = sample_ratio<acc_t>(moments, s.low, s.high);
  }
  const bool has_kl = p.grid.num_terms > 2 && s.kl_weight != 0;
  acc_t sums[kAdded] = {}, largest = 0, slope[N], kl_slope[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const acc_t r = stage == kSamples ? sample.ratio : std::exp(ratio[j]);
    const PolicyTerm<acc_t> term = policy_term(r, advantage[j], s.low, s.high);
    const acc_t divergence = p.grid.num_terms > 2 ? s.kl * kl[j] : acc_t(0);
    const acc_t loss = has_kl ? term.loss + s.kl_weight * divergence : term.loss;
    const acc_t steep = (stage == kSamples ? sample.slope : term.slope) * s.slope;
    slope[j] = k[j] == 0 || steep == 0 ? acc_t(0) : k[j] * steep;
    kl_slope[j] = has_kl && k[j] != 0 ? k[j] * s.kl_slope : acc_t(0);
    if (k[j] == 0) continue;
    sums[kLoss] += k[j] * loss;
    sums[kCounted] += 1;
    sums[kRatio] += r;
    sums[kClipped] += term.cut ? acc_t(1) : acc_t(0);
    sums[kKl] += divergence;
    sums[kNonfinite] += x.given[j] != x.given[j] || !(loss - loss == 0) ? acc_t(1) : acc_t(0);
    largest = r > largest ? r : largest;
  }
  if ((p.outputs & kWriteGrad) && count > 0) {
#pragma unroll 2
    for (int64_t c = 0; c < channels; ++c) {
      load_channel<acc_t, N>(p, s, x, c, d, away);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        d[j] = slope[j] == 0 ? acc_t(0) : slope[j] * d[j];
        if (kl_slope[j] != 0) d[j] += kl_slope[j] * away[j];
      }
      Packed<kDtype, N> packed;
      pack<kDtype, acc_t, N>(d, 0, packed);
      store_packed<kDtype, N>(p.grid.grad.data, x.grad.at + c * x.grad.step, packed);
    }
  }
  if (!(p.outputs & (kWriteLoss | kWriteSums))) return;
  store_block_sums<kAdded>(sums, partials, kColumns, 0, blockIdx.x);
  store_block_max(largest, partials);
  finish<acc_t>(p, t, b, workspace, partials);
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
  return for_dtype(p.grid.dtype, [&](auto dtype) { return launch_for<dtype>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
