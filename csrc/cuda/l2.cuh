// What the kernels of l2.cu and l2_odd.cu share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/arithmetic.cuh"
#include "cuda/l2.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda::l2 {

// A map or weighting, whose values along a run stand side by side.
struct Row {
  const void* data;  // null: there is none
  int64_t batch_stride;
  int32_t dtype;
};

struct Params : Numbers {
  L2Tiling t;
  const void* pred;
  void* grad;
  const void* terms[kMaxTerms];
  int64_t pred_stride, grad_stride, term_strides[kMaxTerms];  // of the batch, in bytes
  Row confidence, mask, weighting;
  float omega, slope;  // without maps
  int32_t phase,
      phase_step;  // elements that sample 0 starts behind a vector's address, and how many more each next one
  int32_t rest;    // elements of a sample, or of a run, that fill no vector
  int32_t run;     // elements of a run: positions
  int64_t count;   // elements of a sample
};

// kMore: two or three terms. kLevels: coefficients that change with u.
template <int32_t kPredDtype, int32_t kTermDtype, bool kMoreTerms, bool kWithMaps, bool kWithLevels>
struct Config {
  static constexpr int32_t kPred = kPredDtype, kTerm = kTermDtype;
  static constexpr bool kMore = kMoreTerms, kMaps = kWithMaps, kLevels = kWithLevels;
  static constexpr int kWidth = vector_width(kPred);
  static constexpr int kStep = kLevels ? 4 : kWidth;  // elements that it computes on at a time
  static constexpr int kTerms = kMore ? kMaxTerms : 1;
  static constexpr int kTermBytes = kWidth * (kTerm == kFloat32 ? 4 : 2);
  // Vectors that a thread has under way; 80 registers allow three blocks a multiprocessor.
  static constexpr int kWords = 4 + kTerms * kTermBytes / 4;
  static constexpr int kRegisters = kWords + (kMaps ? kWidth : 0);
  static constexpr int kBlocks = kLevels && kWidth == 8 ? 2 : 3;  // of a multiprocessor: 128 or 80 registers a thread
  static constexpr int kUnroll = kRegisters <= 8 ? 4 : kRegisters <= 16 ? 2 : 1;
};

template <typename C>
struct Vector {
  uint32_t pred[4];
  uint32_t terms[C::kTerms][(C::kTermBytes + 3) / 4];
};

// What the maps say of a thread's positions. Zero means left out.
template <typename C>
struct Factors {
  float loss[C::kMaps ? C::kWidth : 1];   // omega * v, element-wise v
  float slope[C::kMaps ? C::kWidth : 1];  // of the gradient, its sample's factor included
  float level[C::kLevels ? C::kWidth : 1];
  float least;  // |slope|: 0 if any is, as it is where `loss` is; not looked for where registers are short
};

template <int N>
__device__ __forceinline__ void load_row(const Row& row, int64_t b, int32_t at, float absent, float (&value)[N]) {
  const int64_t first = b * row.batch_stride + static_cast<int64_t>(at) * N;
  uint32_t word[N];
  if (row.data == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = absent;
  } else if (row.dtype == kFloat32) {
    load_bytes<4 * N, true>(static_cast<const float*>(row.data) + first, word);
    unpack_all<kFloat32, N>(word, 0, value);
  } else if (row.dtype == kUInt8 || row.dtype == kBool) {
    load_bytes<N, true>(static_cast<const uint8_t*>(row.data) + first, word);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t byte = word[j / 4] >> (j % 4 * 8) & 0xffu;
      value[j] = row.dtype == kUInt8 ? level_of_byte(byte) : byte != 0 ? 1.0f : 0.0f;
    }
  } else {
    load_bytes<2 * N, true>(static_cast<const uint16_t*>(row.data) + first, word);
    if (row.dtype == kBFloat16) {
      unpack_all<kBFloat16, N>(word, 0, value);
    } else {
      unpack_all<kFloat16, N>(word, 0, value);
    }
  }
}

// load(row, what is there where the row is absent, values): the values of the C::kWidth positions.
template <typename C, typename load_t>
__device__ __forceinline__ void make_factors(const Params& p, float gradient_scale, const load_t& load, Factors<C>& f) {
  constexpr int N = C::kWidth;
  const Line<float> gradients{p.gradients.clean * gradient_scale, p.gradients.step * gradient_scale};
  float value[N];
  f.least = 0;
  load(p.confidence, 0.0f, value);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float most = fminf(value[j], 1.0f), u = value[j] >= p.threshold ? most : 0.0f;
    f.loss[j] = at_level(p.weights, u);
    f.slope[j] = at_level(gradients, u);
    if (C::kLevels) f.level[j] = u;
  }
  if (p.mask.data != nullptr) {
    load(p.mask, 1.0f, value);
#pragma unroll
    for (int j = 0; j < N; ++j) f.loss[j] *= region(value[j]);
  }
  if (p.weighting.data != nullptr) {
    load(p.weighting, 1.0f, value);
#pragma unroll
    for (int j = 0; j < N; ++j) f.loss[j] = f.loss[j] == 0 || value[j] == 0 ? 0.0f : f.loss[j] * value[j];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float slope = f.loss[j] * f.slope[j];
    f.slope[j] = f.loss[j] == 0 ? 0.0f : slope;
    if (!C::kMore) f.least = j == 0 ? fabsf(f.slope[0]) : fminf(f.least, fabsf(f.slope[j]));
  }
}

template <typename C>
__device__ __forceinline__ void compute(const Params& p, const SampleNumbers<C::kTerms>& sample, const Vector<C>& x,
                                        const Factors<C>& f, float& sum, Packed<C::kPred, C::kWidth>& packed) {
  constexpr int N = C::kStep;
#pragma unroll
  for (int step = 0; step < C::kWidth; step += N) {
    float d[N], value[N];
    unpack_all<C::kPred, N>(x.pred, step, d);
    if (p.scales_pred) {
#pragma unroll
      for (int j = 0; j < N; ++j) d[j] *= sample.pred_scale;
    }
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) {
      if (k == 2 && p.terms_used < 3) break;
      unpack_all<C::kTerm, N>(x.terms[k], step, value);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float coef =
            C::kLevels ? at_level(sample.coefs[k], f.level[C::kLevels ? step + j : 0]) : sample.coefs[k].clean;
        d[j] -= coef * value[j];
      }
    }
    if (p.writes_loss) {
      if (C::kMaps && f.least == 0) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (f.loss[C::kMaps ? step + j : 0] != 0) sum += f.loss[C::kMaps ? step + j : 0] * d[j] * d[j];
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) sum += (C::kMaps ? f.loss[C::kMaps ? step + j : 0] * d[j] : d[j]) * d[j];
      }
    }
    if (!p.writes_grad) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] *= f.slope[C::kMaps ? step + j : 0];
    if (C::kMaps && f.least == 0) {
#pragma unroll
      for (int j = 0; j < N; ++j) d[j] = f.slope[C::kMaps ? step + j : 0] == 0 ? 0.0f : d[j];
    }
    pack<C::kPred, float, N>(d, step, packed);
  }
}

// C for N elements that are no vector.
template <typename C, int N>
struct Few : C {
  static constexpr int kWidth = N, kStep = N, kTermBytes = N * (C::kTerm == kFloat32 ? 4 : 2);
};

// How many elements stand before the first vector of sample b.
template <typename C>
__device__ __forceinline__ int32_t head_of(const Params& p, int64_t b) {
  return -(p.phase + static_cast<int32_t>(b) * p.phase_step) & (C::kWidth - 1);
}

// The elements before a sample's first vector and behind its last, one for each of the first threads of a block.
template <typename C>
__device__ __forceinline__ void visit_edges(const Params& p, const SampleNumbers<C::kTerms>& sample, int64_t b,
                                            int32_t head, float& sum) {
  using One = Few<C, 1>;
  constexpr int kBytes = C::kPred == kFloat32 ? 4 : 2;
  const int32_t tail = (p.rest - head) & (C::kWidth - 1), k = static_cast<int32_t>(threadIdx.x);
  if (k >= head + tail) return;
  const int64_t at = k < head ? k : p.count - tail + (k - head);
  Vector<One> x;
  load_bytes<kBytes, true>(static_cast<const char*>(p.pred) + b * p.pred_stride + at * kBytes, x.pred);
#pragma unroll
  for (int t = 0; t < C::kTerms; ++t) {
    if (t >= p.terms_used) break;
    load_bytes<One::kTermBytes, true>(
        static_cast<const char*>(p.terms[t]) + b * p.term_strides[t] + at * One::kTermBytes, x.terms[t]);
  }
  Factors<One> f;
  f.slope[0] = p.slope * sample.gradient_scale;
  if constexpr (C::kMaps) {
    const int32_t position = k < head ? k : p.run - tail + (k - head);
    make_factors(
        p, sample.gradient_scale,
        [&](const Row& row, float absent, float (&value)[1]) { load_row<1>(row, b, position, absent, value); }, f);
  }
  Packed<C::kPred, 1> packed{};
  if (!sample.left_out) compute<One>(p, sample, x, f, sum, packed);
  if (p.writes_grad) store_bytes<kBytes>(static_cast<char*>(p.grad) + b * p.grad_stride + at * kBytes, packed.word);
}

inline Row row(const void* data, int64_t batch_stride, int32_t dtype, bool present) {
  return {present ? data : nullptr, batch_stride, dtype};
}

inline Params params_of(const WeightedLossParams& p, const L2Tiling& t) {
  const int64_t width = vector_width(p.dtype), bytes = dtype_bytes(p.dtype);
  Params q{};
  static_cast<Numbers&>(q) = numbers_of(p);
  q.t = t;
  q.pred = p.pred.data;
  q.grad = p.grad.data;
  q.pred_stride = p.pred.batch_stride * bytes;
  q.grad_stride = p.grad.batch_stride * bytes;
  for (int k = 0; k < p.num_terms; ++k) {
    q.terms[k] = p.terms[k].data;
    q.term_strides[k] = p.terms[k].batch_stride * dtype_bytes(p.terms[k].dtype);
  }
  q.confidence = row(p.confidence.data, p.confidence.batch_stride, p.confidence.dtype, p.confidence.mode != kAbsent);
  q.mask = row(p.mask.data, p.mask.batch_stride, p.mask.dtype, p.mask.mode != kAbsent);
  q.weighting = row(p.weighting.data, p.weighting.batch_stride, p.weighting.dtype, p.weighting.present != 0);
  q.omega = q.weights.clean;
  q.slope = q.weights.clean * q.gradients.clean;
  q.phase = static_cast<int32_t>(reinterpret_cast<uintptr_t>(p.pred.data) / bytes % width);
  q.phase_step = static_cast<int32_t>(p.batch == 1 ? 0 : p.pred.batch_stride % width);
  q.rest = static_cast<int32_t>(p.count % width);
  q.run = static_cast<int32_t>(p.count / t.frees);
  q.count = p.count;
  return q;
}

// run(more than one term, maps, coefficients that change with u), all as constants.
template <typename run_t>
const char* for_kinds_with_maps(const WeightedLossParams& p, const run_t& run) {
  const std::true_type yes;
  const std::false_type no;
  if (p.spatial_coefs) return run(yes, yes, yes);
  return p.num_terms > 1 ? run(yes, yes, no) : run(no, yes, no);
}

}  // namespace diffdoctor::cuda::l2
