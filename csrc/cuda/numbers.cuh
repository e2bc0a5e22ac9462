// What the fast kernels of weighted_loss are told of a call beside its tensors, worked out on the host, in floats: the
// doubles that a plan holds cost a GPU more than the loss.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/weighted_loss.h"
#include "cuda/reduce.cuh"

namespace diffdoctor::cuda {

struct Number {
  const float* data;
  int64_t stride;
  float value;

  __device__ __forceinline__ float of(int64_t b) const { return data ? __ldg(data + b * stride) : value; }
};

inline Number number(const PerSample& from) {
  return {static_cast<const float*>(from.data), from.stride, static_cast<float>(from.value)};
}

struct Numbers {
  Number pred_scale, coefs[kMaxTerms], artifact_coefs[kMaxTerms], weight, z, grad_output;
  int64_t batch;
  int32_t scales_pred;
  int32_t per_sample;  // some number is one for each sample; else loss_scale and gradient_scale hold all of them
  float count, loss_scale, gradient_scale;
  Line<float> weights, gradients;
  float threshold;
  int32_t terms_used, reduction;
  int32_t writes_loss, writes_grad;
  void* loss;
};

inline Numbers numbers_of(const WeightedLossParams& p) {
  Numbers q{};
  for (int k = 0; k < kMaxTerms; ++k) {
    q.coefs[k] = number(p.coefs[k]);
    q.artifact_coefs[k] = number(p.spatial_coefs ? p.artifact_coefs[k] : p.coefs[k]);
  }
  q.pred_scale = number(p.pred_scale);
  q.weight = number(p.weight);
  q.z = number(p.z);
  q.grad_output = number(p.grad_output);
  q.batch = p.batch;
  q.count = static_cast<float>(p.count);
  for (const PerSample* number : {&p.pred_scale, &p.weight, &p.z, &p.grad_output})
    q.per_sample |= number->data != nullptr;
  for (int k = 0; k < p.num_terms; ++k) {
    q.per_sample |= p.coefs[k].data != nullptr || (p.spatial_coefs && p.artifact_coefs[k].data != nullptr);
  }
  // A number that leaves every sample out is found by the way that looks at each.
  q.per_sample |= p.weight.value == 0 || p.z.value == 0;
  double gradient = 2 * p.strength[kL2] / reduction_divisor<double>(p), loss = p.strength[kL2];
  if (!q.per_sample) {
    gradient *= p.grad_output.value * p.weight.value * p.pred_scale.value / p.z.value;
    loss *= p.weight.value;
  }
  q.scales_pred = p.pred_scale.data != nullptr || p.pred_scale.value != 1;
  q.loss_scale = static_cast<float>(loss);
  q.gradient_scale = static_cast<float>(gradient);
  q.weights = spatial_weight<float>(p);
  q.gradients = gradient_weight<float>(p);
  q.threshold = static_cast<float>(p.threshold);
  q.terms_used = p.num_terms;
  q.reduction = p.reduction;
  q.writes_loss = (p.outputs & kWriteLoss) != 0;
  q.writes_grad = (p.outputs & kWriteGrad) != 0;
  q.loss = p.loss;
  return q;
}

inline bool is_narrow_float(int32_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

// Whether a call has what Numbers hold: l2 alone in fp32 arithmetic, all terms of model_pred's dtype or all of fp32.
inline bool has_plain_numbers(const WeightedLossParams& p) {
  if (!is_narrow_float(p.dtype) || p.num_terms < 1 || p.batch > kMostRows) return false;
  for (int j = 0; j < kLossKinds; ++j)
    if ((p.strength[j] != 0) != (j == kL2)) return false;
  for (int k = 0; k < p.num_terms; ++k)
    if (p.terms[k].dtype != p.terms[0].dtype) return false;
  return p.terms[0].dtype == kFloat32 || p.terms[0].dtype == p.dtype;
}

// What is the same for every element of a sample.
template <int kTerms>
struct SampleNumbers {
  float pred_scale, gradient_scale;
  bool left_out;  // its loss and its gradient are 0
  Line<float> coefs[kTerms];

  __device__ __forceinline__ SampleNumbers(const Numbers& p, int64_t b)
      : pred_scale(p.pred_scale.value), gradient_scale(p.gradient_scale), left_out(false) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      coefs[k].clean = p.coefs[k].value;
      coefs[k].step = p.artifact_coefs[k].value - p.coefs[k].value;
    }
    if (!p.per_sample) return;
    const float v = p.weight.of(b), z = p.z.of(b);
    left_out = v == 0 || z == 0;
    pred_scale = p.pred_scale.of(b);
    gradient_scale *= p.grad_output.of(b) * v * pred_scale / z;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (k >= p.terms_used) break;
      coefs[k].clean = p.coefs[k].of(b);
      coefs[k].step = p.artifact_coefs[k].of(b) - coefs[k].clean;
    }
  }
};

// The end of the loss: `sum` is a thread's, not yet scaled; `tiles` blocks along the first axis of the grid share
// sample b.
__device__ __forceinline__ void finish(const Numbers& p, int32_t tiles, int64_t b, float sum, void* workspace) {
  sum *= p.loss_scale;
  float* partials = workspace_body<float>(workspace, p.batch);
  const float sums[1] = {p.per_sample ? sum * p.weight.of(b) : sum};
  store_block_sums<1>(sums, partials, 1, 0, b * tiles + blockIdx.x);
  const auto emit = [&](int64_t sample, const double (&numerator)[1]) {
    const float z = p.z.of(sample);
    float loss = z == 0 ? 0.0f : static_cast<float>(numerator[0]) / z;
    if (p.reduction != kSum) loss /= p.count;
    if (p.reduction == kSample) static_cast<float*>(p.loss)[sample] = loss;
    return static_cast<double>(loss);
  };
  double total;
  if (!reduce_samples<1>(workspace, partials, 1, p.batch, b, tiles, total, emit) || p.reduction == kSample) return;
  *static_cast<float*>(p.loss) =
      static_cast<float>(p.reduction == kMean ? total / static_cast<double>(p.batch) : total);
}

// N elements from the first on, of a dtype that is known at compile time.
template <int32_t kDtype, int N>
__device__ __forceinline__ void unpack_all(const uint32_t* word, int first, float (&value)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int at = first + j;
    if constexpr (kDtype == kFloat32) {
      value[j] = bits_to_float(word[at]);
    } else if constexpr (kDtype == kBFloat16) {
      value[j] = bits_to_float(at % 2 ? word[at / 2] & 0xffff0000u : word[at / 2] << 16);
    } else {
      value[j] = float16_to_float(static_cast<uint16_t>(word[at / 2] >> (at % 2 * 16)));
    }
  }
}

// call(dtype of model_pred, dtype of the terms), both as constants: the terms have model_pred's or are fp32.
template <typename call_t>
const char* for_dtypes(const WeightedLossParams& p, const call_t& call) {
  const std::integral_constant<int32_t, kFloat32> fp32;
  const auto half = [&](auto dtype) { return p.terms[0].dtype == kFloat32 ? call(dtype, fp32) : call(dtype, dtype); };
  if (p.dtype == kFloat32) return call(fp32, fp32);
  return p.dtype == kBFloat16 ? half(std::integral_constant<int32_t, kBFloat16>{})
                              : half(std::integral_constant<int32_t, kFloat16>{});
}

}  // namespace diffdoctor::cuda
