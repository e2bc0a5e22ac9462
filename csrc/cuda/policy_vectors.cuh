// What a lane of policy_lanes.cu holds: its vectors and where they lie, the residuals and squares that it works out of
// them, and the factors of its pixels in the gradient.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/numbers.cuh"
#include "cuda/policy_layout.cuh"
#include "cuda/policy_sums.cuh"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda::policy {

// kPixels: of a vector; where they are fewer than its elements, it holds two channels of a token.
template <int32_t kPredDtype, int32_t kTermDtype, int kPixelsOfVector, bool kWithRef>
struct Config {
  static constexpr int32_t kPred = kPredDtype, kTerm = kTermDtype;
  static constexpr bool kRef = kWithRef;
  static constexpr int kWidth = vector_width(kPred), kPixels = kPixelsOfVector;
  static constexpr int kOwn = kPixels / 4;  // pixels whose ratio a lane works out
  static constexpr int kTermBytes = kWidth * (kTerm == kFloat32 ? 4 : 2);
  static constexpr int kTerms = kRef ? 3 : 2;
  static constexpr int kBlocks = kWidth == 8 || kRef ? 2 : 3;  // of a multiprocessor: 128 or 80 registers a thread
  // Vectors of a lane that stay in registers; what is beyond them is read again.
  static constexpr int kHeld = kRef && kWidth == 8 ? 2 : 4;
  static constexpr int kUnroll = kBlocks == 3 || (kRef && kTermBytes == 32) ? 1 : 2;  // vectors under way
};

struct Params {
  PolicyResult result;
  PolicyStep<float> step;
  Number a, b, sigma, old_mean, grad_output;
  float channels, divisor;
  int32_t per_sample;  // some number is one for each sample
  int32_t old;
  int32_t groups, vectors;  // of a sample; of a group
  int32_t pixels;           // of a vector
  int32_t tile;             // groups of a block
  uint32_t reciprocal;      // of the columns, times 2^shift
  int32_t shift, columns;
  int64_t group_step, vector_step;  // elements
  const char *pred, *terms[kMaxTerms];
  char* grad;
  int64_t pred_stride, grad_stride, term_strides[kMaxTerms];  // of the batch, in bytes
  Pixels advantage, mask, log_prob;
};

// The own pixels of a lane, of a sample whose data start at `data`.
template <int N>
__device__ __forceinline__ void load_pixels(const Pixels& from, const void* data, int32_t row, int32_t column,
                                            int share, float absent, float (&value)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) value[j] = absent;
  if (from.data == nullptr) return;
  const int32_t first = from.steps.at(row, column, share);
  if (from.dtype == kFloat32) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = __ldg(static_cast<const float*>(data) + (first + j * from.steps.pixel));
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = load_element<float>(data, from.dtype, first + j * from.steps.pixel);
  }
}

template <typename C>
struct Vector {
  uint32_t pred[4], terms[C::kTerms][C::kTermBytes / 4];
};

// What is the same for a block, worked out by one of its threads.
template <typename C>
struct Sample {
  PolicyStep<float> step;
  SampleRatio<float> ratio;
  const char *pred, *terms[C::kTerms];
  int64_t grad;  // bytes from its first sample: a pointer would not be known to lead to global memory
  const void *advantage, *mask, *log_prob;

  __device__ __forceinline__ void set(const Params& p, int64_t b) {
    step = p.step;
    if (p.per_sample) {
      set_coefs(step, p.a.of(b), p.b.of(b), p.sigma.of(b), p.grad_output.of(b), p.channels, p.divisor);
      step.old_mean = p.old_mean.of(b);
    }
    pred = p.pred + b * p.pred_stride;
    grad = b * p.grad_stride;
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) terms[k] = p.terms[k] + b * p.term_strides[k];
    advantage = static_cast<const char*>(p.advantage.data) + b * p.advantage.batch_stride;
    mask = static_cast<const char*>(p.mask.data) + b * p.mask.batch_stride;
    log_prob = static_cast<const char*>(p.log_prob.data) + b * p.log_prob.batch_stride;
  }
};

// Where a lane's first vector of a group lies.
template <typename C>
struct Places {
  const char *pred, *terms[C::kTerms];
  char* grad;
  int64_t step;  // elements from a lane's vector to its next

  __device__ __forceinline__ Places(const Params& p, const Sample<C>& s, int32_t group, int share)
      : step(4 * p.vector_step) {
    const int64_t first = group * p.group_step + share * p.vector_step;
    constexpr int kBytes = 16 / C::kWidth, kTermBytes = C::kTermBytes / C::kWidth;
    pred = s.pred + first * kBytes;
    grad = p.grad + s.grad + first * kBytes;
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) terms[k] = s.terms[k] + first * kTermBytes;
  }
  __device__ __forceinline__ void load(int u, Vector<C>& x) const {
    load_bytes<16, true>(pred + u * step * (16 / C::kWidth), x.pred);
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k)
      load_bytes<C::kTermBytes, true>(terms[k] + u * step * (C::kTermBytes / C::kWidth), x.terms[k]);
  }
  __device__ __forceinline__ void store(int u, const uint32_t (&word)[4]) const {
    store_bytes<16>(grad + u * step * (16 / C::kWidth), word);
  }
};

// next_latents - mu, and model_pred - ref_pred.
template <typename C>
struct Residuals {
  float d[C::kWidth], away[C::kRef ? C::kWidth : 1];

  __device__ __forceinline__ void set(const PolicyStep<float>& s, const Vector<C>& x) {
    float pred[C::kWidth], value[C::kWidth];
    unpack_all<C::kPred, C::kWidth>(x.pred, 0, pred);
    unpack_all<C::kTerm, C::kWidth>(x.terms[1], 0, d);
    unpack_all<C::kTerm, C::kWidth>(x.terms[0], 0, value);
#pragma unroll
    for (int j = 0; j < C::kWidth; ++j) d[j] = d[j] - s.a * value[j] - s.b * pred[j];
    if constexpr (C::kRef) {
      unpack_all<C::kTerm, C::kWidth>(x.terms[2], 0, value);
#pragma unroll
      for (int j = 0; j < C::kWidth; ++j) away[j] = pred[j] - value[j];
    }
  }
  __device__ __forceinline__ void add_squares(float (&sum)[C::kPixels], float (&kl)[C::kPixels]) const {
#pragma unroll
    for (int j = 0; j < C::kWidth; ++j) {
      sum[j % C::kPixels] += d[j] * d[j];
      if constexpr (C::kRef) kl[j % C::kPixels] += away[j] * away[j];
    }
  }
};

// The factors of all pixels of a group in the gradient.
template <typename C>
struct Factors {
  float slope[C::kPixels], kl_slope[C::kRef ? C::kPixels : 1];
  float least;  // 0 if any is

  __device__ __forceinline__ Factors(const Slopes<float, C::kOwn>& own) {
    const int first = static_cast<int>(threadIdx.x) & 28;
    least = 1;
#pragma unroll
    for (int j = 0; j < C::kPixels; ++j) {
      slope[j] = __shfl_sync(0xffffffffu, own.policy[j % C::kOwn], first + j / C::kOwn);
      least = fminf(least, fabsf(slope[j]));
      if constexpr (C::kRef) {
        kl_slope[j] = __shfl_sync(0xffffffffu, own.kl[j % C::kOwn], first + j / C::kOwn);
        least = fminf(least, fabsf(kl_slope[j]));
      }
    }
  }
  // kSelects: where a factor is 0 the gradient is, whatever the residual.
  template <bool kSelects>
  __device__ __forceinline__ void write_gradient(const Places<C>& to, int u, const Residuals<C>& x) const {
    float value[C::kWidth];
#pragma unroll
    for (int j = 0; j < C::kWidth; ++j) {
      const int k = j % C::kPixels;
      value[j] = kSelects && slope[k] == 0 ? 0.0f : slope[k] * x.d[j];
      if constexpr (C::kRef) value[j] += kSelects && kl_slope[k] == 0 ? 0.0f : kl_slope[k] * x.away[j];
    }
    Packed<C::kPred, C::kWidth> packed;
    pack<C::kPred, float, C::kWidth>(value, 0, packed);
    to.store(u, packed.word);
  }
};

// Adds what the four lanes of a group hold of its pixels; each keeps its own.
template <int kPixels>
__device__ __forceinline__ void add_lanes(const float (&sum)[kPixels], float (&own)[kPixels / 4]) {
  const bool second = threadIdx.x & 2, odd = threadIdx.x & 1;
  constexpr int kHalf = kPixels / 2, kOwn = kPixels / 4;
  float half[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float given = second ? sum[j] : sum[kHalf + j], kept = second ? sum[kHalf + j] : sum[j];
    half[j] = kept + __shfl_xor_sync(0xffffffffu, given, 2);
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const float given = odd ? half[j] : half[kOwn + j], kept = odd ? half[kOwn + j] : half[j];
    own[j] = kept + __shfl_xor_sync(0xffffffffu, given, 1);
  }
}

}  // namespace diffdoctor::cuda::policy
