#include <cuda_runtime.h>

#include "cuda/l2.h"
#include "cuda/launch.cuh"
#include "cuda/policy_lanes.h"
#include "cuda/policy_vectors.cuh"

namespace diffdoctor::cuda {
namespace {

using namespace policy;

// One row of blocks for each sample.
template <typename C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    policy_lanes_kernel(const __grid_constant__ Params p, int32_t stage, void* workspace) {
  constexpr int N = C::kOwn;
  const unsigned b = blockIdx.y;
  const int64_t block = b * p.result.per_sample + blockIdx.x;
  float* partials = workspace_body<float>(workspace, p.result.batch);
  __shared__ Sample<C> sample;
  const PolicyStep<float>& s = sample.step;
  if (threadIdx.x == 0) {
    sample.set(p, b);
    if (stage == kSamples) sample.ratio = load_sample_ratio<float>(moments_in(partials, p.result), b, s.low, s.high);
  }
  __syncthreads();

  const int share = static_cast<int>(threadIdx.x) % 4;
  const int32_t vectors = (p.vectors - share + 3) / 4;
  int32_t group = static_cast<int32_t>(blockIdx.x) * p.tile + static_cast<int32_t>(threadIdx.x) / 4;
  // A thread's sums. Those behind the loss, which are seldom wanted, would cost the others their registers.
  __shared__ float more_sums[kColumns][kThreads];
  const bool writes_sums = (p.result.outputs & kWriteSums) != 0;
  if (writes_sums) {
#pragma unroll
    for (int c = 1; c < kColumns; ++c) more_sums[c][threadIdx.x] = 0;
  }
  const auto add = [&](int c, float value) {
    float& to = more_sums[c][threadIdx.x];
    to = c == kAdded ? fmaxf(to, value) : to + value;
  };
  float moments[kPolicyMoments] = {};  // or the loss
#pragma unroll 1
  for (int32_t done = 0; done < p.tile; done += kGroupsPerBlock, group += kGroupsPerBlock) {
    const bool inside = group < p.groups;
    const int32_t count = inside ? vectors : 0;
    const Places<C> places(p, sample, group, share);
    Vector<C> x[C::kUnroll];
#pragma unroll
    for (int u = 0; u < C::kUnroll; ++u)
      if (u < count) places.load(u, x[u]);
    const auto row =
        static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(group)) * p.reciprocal >> p.shift);
    const int32_t column = group - row * p.columns;
    float k[N] = {}, given[N] = {}, old[N] = {};
    if (inside && stage != kLogProbs) {
      load_pixels(p.advantage, sample.advantage, row, column, share, 0.0f, given);
      load_pixels(p.mask, sample.mask, row, column, share, 1.0f, k);
      if (p.old == kOldPerPixel) load_pixels(p.log_prob, sample.log_prob, row, column, share, 0.0f, old);
    }

    Residuals<C> held[C::kHeld];
    float sum[C::kPixels] = {}, kl[C::kPixels] = {};
#pragma unroll
    for (int u = 0; u < C::kHeld; ++u) {
      if (u >= count) break;
      held[u].set(s, x[u % C::kUnroll]);
      if (u + C::kUnroll < C::kHeld && u + C::kUnroll < count) places.load(u + C::kUnroll, x[u % C::kUnroll]);
      held[u].add_squares(sum, kl);
    }
#pragma unroll 1
    for (int u = C::kHeld; u < count; ++u) {
      Residuals<C> more;
      places.load(u, x[0]);
      more.set(s, x[0]);
      more.add_squares(sum, kl);
    }
    float own[N], own_kl[N] = {}, change[N];
    add_lanes<C::kPixels>(sum, own);
    if constexpr (C::kRef) add_lanes<C::kPixels>(kl, own_kl);
    if (stage == kLogProbs) {
      if (!inside) continue;
      float* const to =
          static_cast<float*>(const_cast<void*>(sample.log_prob)) + p.log_prob.steps.at(row, column, share);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        to[j * p.log_prob.steps.pixel] = s.inverse == 0 ? 0.0f : s.log_prob * own[j];
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      k[j] = inside && s.inverse != 0 ? region(k[j]) : 0.0f;
      const float now = s.log_prob * own[j];
      change[j] = now - (p.old == kOldIsNew ? now : p.old == kOldPerPixel ? old[j] : s.old_mean);
    }
    if (stage == kMoments) {
#pragma unroll
      for (int j = 0; j < N; ++j) given[j] = bounded_advantage(given[j], s.most);
      add_moments(k, given, change, moments);
      continue;
    }
    Slopes<float, N> slopes;
    moments[kLoss] +=
        weigh_pixels(s, stage == kSamples, sample.ratio, C::kRef, writes_sums, k, given, change, own_kl, slopes, add);
    if (!(p.result.outputs & kWriteGrad)) continue;
    const Factors<C> factors(slopes);
    if (factors.least == 0) {
#pragma unroll
      for (int u = 0; u < C::kHeld; ++u)
        if (u < count) factors.template write_gradient<true>(places, u, held[u]);
    } else {
#pragma unroll
      for (int u = 0; u < C::kHeld; ++u)
        if (u < count) factors.template write_gradient<false>(places, u, held[u]);
    }
#pragma unroll 1
    for (int u = C::kHeld; u < count; ++u) {
      Residuals<C> more;
      places.load(u, x[0]);
      more.set(s, x[0]);
      factors.template write_gradient<true>(places, u, more);
    }
  }
  if (stage == kMoments) {
    finish_moments(p.result, b, block, moments, workspace, partials, moments_in(partials, p.result));
  } else if (p.result.outputs & (kWriteLoss | kWriteSums)) {
    float sums[kColumns] = {moments[kLoss]};
    if (writes_sums) {
#pragma unroll
      for (int c = 1; c < kColumns; ++c) sums[c] = more_sums[c][threadIdx.x];
    }
    finish(p.result, b, block, sums, workspace, partials);
  }
}

void set_numbers(const PolicyLossParams& p, Params& q) {
  q.a = number(p.a);
  q.b = number(p.b);
  q.sigma = number(p.sigma);
  q.grad_output = number(p.grad_output);
  q.old = p.old;
  if (p.old == kOldPerSample) q.old_mean = number(p.old_mean);
  q.channels = static_cast<float>(p.channels());
  q.divisor = policy_divisor<float>(p, p.grid.batch, q.result.pixels);
  for (const Number* one : {&q.a, &q.b, &q.sigma, &q.grad_output, &q.old_mean}) q.per_sample |= one->data != nullptr;
  PolicyLossParams fixed = p;  // what one number for each sample says is on the device
  for (PerSample* one : {&fixed.a, &fixed.b, &fixed.sigma, &fixed.grad_output, &fixed.old_mean}) one->data = nullptr;
  q.step = policy_step<float>(fixed, p.grid.batch, q.result.pixels, 0);
}

// What a launch is told; false where the kernel does not serve the call.
bool describe(const PolicyLossParams& p, Params& q) {
  const WeightedLossParams& g = p.grid;
  Layout t;
  if (!is_narrow_float(g.dtype) || !g.contiguous || g.batch > kMostRows || !find_layout(p, t)) return false;
  const int width = vector_width(g.dtype);
  const bool grad = (p.outputs & kWriteGrad) != 0;
  bool fits = is_aligned(g.pred, g.batch, width) && (!grad || is_aligned(g.grad, g.batch, width));
  for (int k = 0; k < g.num_terms; ++k)
    fits = fits && g.terms[k].dtype == g.terms[0].dtype && is_aligned(g.terms[k], g.batch, width);
  fits = fits && (g.terms[0].dtype == kFloat32 || g.terms[0].dtype == g.dtype);
  fits = fits && find_pixels(p, t, g.confidence, q.advantage) && find_pixels(p, t, g.mask, q.mask);
  q.log_prob = {g.weighting.data, g.weighting.batch_stride * dtype_bytes(g.weighting.dtype), g.weighting.dtype, {}};
  if (p.old == kOldPerPixel || (p.outputs & kWriteLogProb))
    fits = fits && g.weighting.dtype == kFloat32 && find_steps(p, t, g.weighting.stride, q.log_prob.steps);
  if (!fits) return false;

  const int64_t channel = g.pred.stride[p.channel_dim], bytes = dtype_bytes(g.dtype);
  q.groups = static_cast<int32_t>(t.groups);
  q.pixels = t.pixels;
  q.vectors = static_cast<int32_t>(p.channels() * t.pixels / width);
  q.group_step = t.tokens ? p.channels() * 4 : width;
  q.vector_step = t.tokens ? width : channel;
  q.columns = static_cast<int32_t>(t.columns);
  q.shift = 31;
  while ((int64_t{1} << (q.shift - 31)) < t.columns) ++q.shift;
  q.reciprocal = static_cast<uint32_t>(((uint64_t{1} << q.shift) + t.columns - 1) / t.columns);
  // As for weighted_loss: a lane takes several groups where that leaves enough tiles.
  const int64_t visit = ceil_div(q.vectors, 4);
  for (const int64_t each : {8, 4, 2, 1}) {
    q.tile = static_cast<int32_t>(each * kGroupsPerBlock);
    if (ceil_div(t.groups, q.tile) * g.batch >= tiles_per_vector * each * visit) break;
  }
  q.result = PolicyResult(p, ceil_div(t.groups, q.tile));
  set_numbers(p, q);
  q.pred = static_cast<const char*>(g.pred.data);
  q.grad = static_cast<char*>(g.grad.data);
  q.pred_stride = g.pred.batch_stride * bytes;
  q.grad_stride = g.grad.batch_stride * bytes;
  for (int k = 0; k < g.num_terms; ++k) {
    q.terms[k] = static_cast<const char*>(g.terms[k].data);
    q.term_strides[k] = g.terms[k].batch_stride * dtype_bytes(g.terms[k].dtype);
  }
  return true;
}

template <typename C>
const char* launch_stages(const PolicyLossParams& p, const Params& q, void* workspace, void* stream) {
  const auto run = [&](int32_t stage) {
    return launch_rows<policy_lanes_kernel<C>>(q.result.per_sample, q.result.batch, stream, q, stage, workspace);
  };
  if (p.outputs & kWriteLogProb) return run(kLogProbs);
  if (p.level == kPixelLevel) return run(kPixels);
  const char* error = run(kMoments);
  return error != nullptr ? error : run(kSamples);
}

template <int32_t kPred, int32_t kTerm>
const char* launch_for(const PolicyLossParams& p, const Params& q, void* workspace, void* stream) {
  constexpr int kWidth = vector_width(kPred);
  if (q.pixels != kWidth) {
    return p.has_ref() ? launch_stages<Config<kPred, kTerm, 4, true>>(p, q, workspace, stream)
                       : launch_stages<Config<kPred, kTerm, 4, false>>(p, q, workspace, stream);
  }
  return p.has_ref() ? launch_stages<Config<kPred, kTerm, kWidth, true>>(p, q, workspace, stream)
                     : launch_stages<Config<kPred, kTerm, kWidth, false>>(p, q, workspace, stream);
}

}  // namespace

bool policy_lanes_serve(const PolicyLossParams& p) {
  Params q{};
  return describe(p, q);
}

const char* launch_policy_lanes(const PolicyLossParams& p, void* workspace, void* stream) {
  Params q{};
  describe(p, q);
  return for_dtypes(p.grid, [&](auto dtype, auto terms) { return launch_for<dtype, terms>(p, q, workspace, stream); });
}

}  // namespace diffdoctor::cuda
