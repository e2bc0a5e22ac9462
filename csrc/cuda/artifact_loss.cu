// artifact_loss: logits up-sampled bilinearly, through a sigmoid, reduced per picture. The up-sampled map exists only
// in registers. Each logit gathers its own gradient from the pixels it touches, so nothing is added atomically.
#include <cuda_runtime.h>

#include "common/resample.h"
#include "cuda/artifact_loss.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tiling.h"

namespace diffdoctor::cuda {
namespace {

// The threads of a block are split into groups of `lanes`, one logit each; a group's lanes share its window's columns.
struct Grouping {
  int32_t lanes;  // a power of two up to 32
  int64_t blocks_per_sample;
};

Grouping group(const ArtifactLossParams& p) {
  Grouping g{1, 0};
  const int64_t window = 2 * p.out_w / p.in_w;
  while (g.lanes < 32 && 2 * g.lanes <= window) g.lanes *= 2;
  g.blocks_per_sample = ceil_div(p.in_h * p.in_w, kThreads / g.lanes);
  return g;
}

// What a picture's pixels add up to: the sum of the counted confidences and their number; or the largest and its ties.
template <typename T>
struct Tally {
  T value, count;

  __device__ __forceinline__ void add(int32_t method, T c, T threshold) {
    if (method == kMethodMax) {
      merge(method, Tally{c, 1});
    } else if (method != kThreshold || c > threshold) {
      value += c;
      count += 1;
    }
  }
  __device__ __forceinline__ void merge(int32_t method, Tally other) {
    if (method != kMethodMax) {
      value += other.value;
      count += other.count;
    } else if (other.value == value) {
      count += other.count;
    } else if (other.value > value || other.value != other.value) {  // NaN wins, and stays
      *this = other;
    }
  }
  __device__ __forceinline__ void merge_warp(int32_t method) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      merge(method, Tally{__shfl_xor_sync(0xffffffffu, value, offset), __shfl_xor_sync(0xffffffffu, count, offset)});
    }
  }
  // A confidence is at least 0, so that -1 loses against all.
  static __device__ __forceinline__ Tally none(int32_t method) { return {T(method == kMethodMax ? -1 : 0), 0}; }
};

// Output positions along one axis that read input position i, [begin, end), and from `own` on those whose first
// neighbour it is: the picture is dealt out among the logits by that rule.
template <typename acc_t>
struct Window {
  int64_t begin, own, end;

  static __device__ __forceinline__ int64_t first_neighbour(int64_t at, int64_t in, int64_t out) {
    int64_t first, second;
    acc_t weight;
    bilinear_index<acc_t>(at, in, out, first, second, weight);
    return first;
  }
  // The first output position whose first neighbour is i or later. The estimate is off by one or so, from rounding.
  static __device__ __forceinline__ int64_t reaching(int64_t i, int64_t in, int64_t out) {
    if (i <= 0) return 0;
    if (i >= in) return out;
    int64_t at =
        static_cast<int64_t>((static_cast<acc_t>(i) + acc_t(0.5)) * static_cast<acc_t>(out) / static_cast<acc_t>(in));
    at = at < out ? at : out - 1;
    while (at > 0 && first_neighbour(at - 1, in, out) >= i) --at;
    while (at < out && first_neighbour(at, in, out) < i) ++at;
    return at;
  }
  __device__ __forceinline__ Window(int64_t i, int64_t in, int64_t out) {
    begin = reaching(i - 1, in, out);
    own = reaching(i, in, out);
    end = reaching(i + 1, in, out);
  }
};

template <typename acc_t>
struct Axis {
  int64_t first, second;
  acc_t weight;

  __device__ __forceinline__ Axis(int64_t at, int64_t in, int64_t out) {
    bilinear_index<acc_t>(at, in, out, first, second, weight);
  }
  // How much of input position i is in this output position.
  __device__ __forceinline__ acc_t share_of(int64_t i) const {
    return (first == i ? 1 - weight : acc_t(0)) + (second == i ? weight : acc_t(0));
  }
};

template <int32_t kDtype, typename acc_t>
__device__ __forceinline__ acc_t confidence_at(const ArtifactLossParams& p, int64_t b, const Axis<acc_t>& y,
                                               const Axis<acc_t>& x) {
  const int64_t top = b * p.batch_stride + y.first * p.row_stride;
  const int64_t bottom = b * p.batch_stride + y.second * p.row_stride;
  const int64_t left = x.first * p.col_stride, right = x.second * p.col_stride;
  const auto logit = [&](int64_t at) { return load_element<acc_t>(p.logits, kDtype, at); };
  // A weight of 0 selects: an infinite neighbour does not reach a map that is not enlarged.
  const auto blend = [](acc_t low, acc_t high, acc_t weight) {
    return weight == 0 ? low : (1 - weight) * low + weight * high;
  };
  const acc_t upper = blend(logit(top + left), logit(top + right), x.weight);
  const acc_t lower = blend(logit(bottom + left), logit(bottom + right), x.weight);
  return 1 / (1 + std::exp(-blend(upper, lower, y.weight)));
}

// Goes over a logit's window. Returns its share of the tally; adds to `unit_grad` the gradient of the picture's sum.
template <int32_t kDtype, typename acc_t>
__device__ __forceinline__ Tally<acc_t> visit_window(const ArtifactLossParams& p, int64_t b, int64_t i, int64_t j,
                                                     int lane, int lanes, bool gather, const acc_t* maximum,
                                                     acc_t& unit_grad) {
  const acc_t threshold = static_cast<acc_t>(p.threshold);
  const Window<acc_t> rows(i, p.in_h, p.out_h), columns(j, p.in_w, p.out_w);
  Tally<acc_t> tally = Tally<acc_t>::none(p.method);
  for (int64_t y = gather ? rows.begin : rows.own; y < rows.end; ++y) {
    const Axis<acc_t> vertical(y, p.in_h, p.out_h);
    for (int64_t x = (gather ? columns.begin : columns.own) + lane; x < columns.end; x += lanes) {
      const Axis<acc_t> horizontal(x, p.in_w, p.out_w);
      const acc_t c = confidence_at<kDtype, acc_t>(p, b, vertical, horizontal);
      if (y >= rows.own && x >= columns.own) tally.add(p.method, c, threshold);
      if (!gather) continue;
      if (p.method == kThreshold && c <= threshold) continue;  // a NaN is not passed over
      if (p.method == kMethodMax && c != *maximum) continue;
      const acc_t share = vertical.share_of(i) * horizontal.share_of(j);
      if (share != 0) unit_grad += c * (1 - c) * share;
    }
  }
  return tally;
}

// A picture's loss.
template <typename acc_t>
__device__ __forceinline__ double emit_picture(const ArtifactLossParams& p, int64_t b, const Tally<double>& tally) {
  const double pixels = static_cast<double>(p.out_h) * static_cast<double>(p.out_w);
  double factor = 1;
  if (p.method == kThreshold) factor = 1 / (tally.count + 1e-5);
  if (p.method == kMethodMean) factor = 1 / pixels;
  const double loss = tally.value * factor;
  if (p.method == kMethodMax) {
    factor = tally.value == tally.value ? 1 / tally.count : tally.value;  // a NaN is the whole picture's gradient
    if (p.maxima != nullptr) static_cast<acc_t*>(p.maxima)[b] = static_cast<acc_t>(tally.value);
  }
  if (p.reduction == kMean) factor /= static_cast<double>(p.batch);
  if (p.unit_grad != nullptr) static_cast<acc_t*>(p.factor)[b] = static_cast<acc_t>(factor);
  if (p.reduction == kSample) static_cast<acc_t*>(p.loss)[b] = static_cast<acc_t>(loss);
  return loss;
}

// A block's tally, in thread 0.
template <typename T>
__device__ __forceinline__ void merge_block(int32_t method, Tally<T>& tally) {
  __shared__ Tally<T> shared[kWarps];
  tally.merge_warp(method);
  __syncthreads();  // an earlier tally has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = tally;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) tally.merge(method, shared[w]);
}

// To be called by every block of picture b once it has stored its tally.
template <typename acc_t>
__device__ __forceinline__ void finish(const ArtifactLossParams& p, const Grouping& g, int64_t b, void* workspace,
                                       const Tally<acc_t>* partials) {
  const Counter counter(p.batch, b);
  unsigned* done = &static_cast<WorkspaceHead*>(workspace)->blocks_done[counter.index];
  if (!arrives_last(done, static_cast<unsigned>((counter.end - counter.begin) * g.blocks_per_sample))) return;
  for (int64_t picture = counter.begin; picture < counter.end; ++picture) {
    Tally<double> tally = Tally<double>::none(p.method);
    for (int64_t k = threadIdx.x; k < g.blocks_per_sample; k += kThreads) {
      const Tally<acc_t>* partial = partials + picture * g.blocks_per_sample + k;
      tally.merge(p.method, Tally<double>{__ldcg(&partial->value), __ldcg(&partial->count)});
    }
    merge_block(p.method, tally);
    if (threadIdx.x == 0) workspace_shares(workspace)[picture] = emit_picture<acc_t>(p, picture, tally);
  }
  double total;
  if (!sum_shares(workspace, counter, p.batch, total) || p.reduction == kSample) return;
  *static_cast<acc_t*>(p.loss) =
      static_cast<acc_t>(p.reduction == kMean ? total / static_cast<double>(p.batch) : total);
}

// The second pass, which only the largest confidence needs, finds in `maxima` what the first left. Both are this one
// kernel, so that a pixel's confidence has the same bits in both.
template <int32_t kDtype>
__global__ void __launch_bounds__(kThreads, 2)
    artifact_loss_kernel(const __grid_constant__ ArtifactLossParams p, const __grid_constant__ Grouping g,
                         bool second_pass, void* workspace) {
  using acc_t = std::conditional_t<kDtype == kFloat64, double, float>;
  const int64_t b = blockIdx.x / g.blocks_per_sample;
  Tally<acc_t>* partials = workspace_body<Tally<acc_t>>(workspace, p.batch);
  const int64_t logit = (blockIdx.x - b * g.blocks_per_sample) * (kThreads / g.lanes) + threadIdx.x / g.lanes;
  const bool gather = p.unit_grad != nullptr && (second_pass || p.method != kMethodMax);
  const bool inside = logit < p.in_h * p.in_w;
  Tally<acc_t> tally = Tally<acc_t>::none(p.method);
  acc_t unit_grad = 0;
  if (inside) {
    const int64_t i = logit / p.in_w;
    tally = visit_window<kDtype, acc_t>(p, b, i, logit - i * p.in_w, threadIdx.x % g.lanes, g.lanes, gather,
                                        second_pass ? static_cast<const acc_t*>(p.maxima) + b : nullptr, unit_grad);
  }
  if (gather) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const acc_t other = __shfl_xor_sync(0xffffffffu, unit_grad, offset);
      if (offset < g.lanes) unit_grad += other;
    }
    if (inside && threadIdx.x % g.lanes == 0) static_cast<acc_t*>(p.unit_grad)[b * p.in_h * p.in_w + logit] = unit_grad;
  }
  if (second_pass) return;
  merge_block(p.method, tally);
  if (threadIdx.x == 0) partials[blockIdx.x] = tally;
  finish<acc_t>(p, g, b, workspace, partials);
}

template <int32_t kDtype>
const char* launch_for(const ArtifactLossParams& p, void* workspace, void* stream) {
  const Grouping g = group(p);
  const int64_t blocks = p.batch * g.blocks_per_sample;
  const char* error = launch<artifact_loss_kernel<kDtype>>(blocks, stream, p, g, false, workspace);
  if (error != nullptr || p.unit_grad == nullptr || p.method != kMethodMax) return error;
  return launch<artifact_loss_kernel<kDtype>>(blocks, stream, p, g, true, workspace);
}

}  // namespace

int64_t artifact_loss_workspace(const ArtifactLossParams& p) {
  const int64_t bytes = p.dtype == kFloat64 ? 8 : 4;
  return workspace_bytes(p.batch, 2 * p.batch * group(p).blocks_per_sample, bytes);
}

const char* launch_artifact_loss(const ArtifactLossParams& p, void* workspace, void* stream) {
  return for_dtype(p.dtype, [&](auto dtype) { return launch_for<dtype>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
