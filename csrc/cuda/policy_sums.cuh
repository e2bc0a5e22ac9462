// How the kernels of policy_loss end: their blocks' partial sums become the loss and what PolicyStats shows.
#pragma once

#include <cuda_runtime.h>

#include "common/policy_loss.h"
#include "cuda/reduce.cuh"

namespace diffdoctor::cuda {

// The partial sums of a block: the loss, then those of PolicySum; the largest ratio is the last of them.
enum Column { kLoss, kCounted, kRatio, kClipped, kKl, kNonfinite, kAdded };
constexpr int kColumns = kAdded + 1;

enum Stage : int32_t { kPixels, kMoments, kSamples, kLogProbs };

// Stores the largest of a block's values, none of them negative, in its row of partial sums.
template <typename acc_t>
__device__ __forceinline__ void store_block_max(acc_t value, acc_t* partials, int64_t block) {
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
  partials[block * kColumns + kAdded] = value;
}

// Where the sums of a launch go.
struct PolicyResult {
  int64_t batch, pixels, per_sample;  // pixels and blocks of a sample
  int32_t reduction, outputs;
  void *loss, *sums;

  PolicyResult() = default;
  __host__ __device__ PolicyResult(const PolicyLossParams& p, int64_t blocks)
      : batch(p.grid.batch),
        pixels(p.grid.count / p.grid.size[p.channel_dim]),
        per_sample(blocks),
        reduction(p.reduction),
        outputs(p.outputs),
        loss(p.loss),
        sums(p.sums) {}
};

// sums: a thread's, the largest ratio last, of the block'th block of the grid. Without kWriteSums the first alone is
// stored.
template <typename acc_t>
__device__ __forceinline__ void finish(const PolicyResult& p, int64_t sample, int64_t block,
                                       const acc_t (&sums)[kColumns], void* workspace, acc_t* partials) {
  const bool sums_wanted = (p.outputs & kWriteSums) != 0;
  const int columns = sums_wanted ? kColumns : 1;
  if (sums_wanted) {
    store_block_sums<kColumns>(sums, partials, kColumns, 0, block);  // the last of them is none, and overwritten
  } else {
    const acc_t loss[1] = {sums[kLoss]};
    store_block_sums<1>(loss, partials, 1, 0, block);
  }
  if (sums_wanted) store_block_max(sums[kAdded], partials, block);
  const auto emit = [&](int64_t b, const double (&total)[kColumns]) {
    if (sums_wanted) {
      acc_t* out = static_cast<acc_t*>(p.sums) + b * kPolicySums;
      constexpr int kColumn[kAdded] = {-1, kPolicyCounted, kPolicyRatio, kPolicyClipped, kPolicyKl, kPolicyNonfinite};
#pragma unroll
      for (int c = 1; c < kAdded; ++c) out[kColumn[c]] = static_cast<acc_t>(total[c]);
      acc_t most = 0;
      for (int64_t k = 0; k < p.per_sample; ++k) {
        const acc_t other = __ldcg(partials + (b * p.per_sample + k) * kColumns + kAdded);
        most = other > most ? other : most;
      }
      out[kPolicyLargest] = most;
    }
    const double share = p.reduction == kSum ? total[kLoss] : total[kLoss] / static_cast<double>(p.pixels);
    if (p.reduction == kSample && (p.outputs & kWriteLoss)) static_cast<acc_t*>(p.loss)[b] = static_cast<acc_t>(share);
    return share;
  };
  double total;
  if (!reduce_samples<kColumns>(workspace, partials, columns, p.batch, sample, p.per_sample, total, emit)) return;
  if ((p.outputs & kWriteLoss) && p.reduction != kSample) {
    *static_cast<acc_t*>(p.loss) =
        static_cast<acc_t>(p.reduction == kMean ? total / static_cast<double>(p.batch) : total);
  }
}

// What level "sample" adds up of N pixels: change is the log-probability less the old one.
template <typename acc_t, int N>
__device__ __forceinline__ void add_moments(const acc_t (&k)[N], const acc_t (&advantage)[N], const acc_t (&change)[N],
                                            acc_t (&moments)[kPolicyMoments]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (k[j] == 0) continue;
    moments[kMomentChange] += k[j] * change[j];
    moments[kMomentWeight] += k[j];
    if (advantage[j] > 0) moments[kMomentPositive] += k[j] * advantage[j];
    if (advantage[j] < 0) moments[kMomentNegative] += k[j] * advantage[j];
  }
}

// A thread's moments, added up over its sample by the sample's last block: `all` has (batch, kPolicyMoments).
template <typename acc_t>
__device__ __forceinline__ void finish_moments(const PolicyResult& p, int64_t sample, int64_t block,
                                               const acc_t (&moments)[kPolicyMoments], void* workspace, acc_t* partials,
                                               double* all) {
  store_block_sums<kPolicyMoments>(moments, partials, kPolicyMoments, 0, block);
  const auto emit = [&](int64_t index, const double (&sums)[kPolicyMoments]) {
#pragma unroll
    for (int c = 0; c < kPolicyMoments; ++c) all[index * kPolicyMoments + c] = sums[c];
    return 0.0;
  };
  double unused;
  reduce_samples<kPolicyMoments>(workspace, partials, kPolicyMoments, p.batch, sample, p.per_sample, unused, emit);
}

// Where the moments of level "sample" stand, behind the partial sums.
template <typename acc_t>
__device__ __forceinline__ double* moments_in(acc_t* partials, const PolicyResult& p) {
  return reinterpret_cast<double*>(partials + 2 * ((p.batch * p.per_sample * kColumns + 1) / 2));
}

template <typename acc_t>
__device__ __forceinline__ SampleRatio<acc_t> load_sample_ratio(const double* moments, int64_t sample, acc_t low,
                                                                acc_t high) {
  double own[kPolicyMoments];
#pragma unroll
  for (int c = 0; c < kPolicyMoments; ++c) own[c] = moments[sample * kPolicyMoments + c];
  return sample_ratio<acc_t>(own, low, high);
}

// The factors of N pixels' residuals in the gradient.
template <typename acc_t, int N>
struct Slopes {
  acc_t policy[N], kl[N];
};

// What N pixels add to the loss; their slopes. given: the advantages as they came. kl: the sums over channels of
// (model_pred - ref_pred)^2. add(column, value): to the sums behind the loss, where they are wanted; at kAdded the
// largest value counts.
template <typename acc_t, int N, typename Add>
__device__ __forceinline__ acc_t weigh_pixels(const PolicyStep<acc_t>& s, bool by_sample,
                                              const SampleRatio<acc_t>& sample, bool has_ref, bool writes_sums,
                                              const acc_t (&k)[N], const acc_t (&given)[N], const acc_t (&change)[N],
                                              const acc_t (&kl)[N], Slopes<acc_t, N>& slopes, const Add& add) {
  acc_t total = 0;
  const bool has_kl = has_ref && s.kl_weight != 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const acc_t r = by_sample ? sample.ratio : std::exp(change[j]);
    const PolicyTerm<acc_t> term = policy_term(r, bounded_advantage(given[j], s.most), s.low, s.high);
    const acc_t divergence = has_ref ? s.kl * kl[j] : acc_t(0);
    const acc_t loss = has_kl ? term.loss + s.kl_weight * divergence : term.loss;
    const acc_t steep = (by_sample ? sample.slope : term.slope) * s.slope;
    slopes.policy[j] = k[j] == 0 || steep == 0 ? acc_t(0) : k[j] * steep;
    slopes.kl[j] = has_kl && k[j] != 0 ? k[j] * s.kl_slope : acc_t(0);
    if (k[j] == 0) continue;
    total += k[j] * loss;
    if (!writes_sums) continue;
    add(kCounted, acc_t(1));
    add(kRatio, r);
    add(kClipped, term.cut ? acc_t(1) : acc_t(0));
    add(kKl, divergence);
    add(kNonfinite, given[j] != given[j] || !(loss - loss == 0) ? acc_t(1) : acc_t(0));
    add(kAdded, r);
  }
  return total;
}

}  // namespace diffdoctor::cuda
