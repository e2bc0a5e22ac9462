#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/l2.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda {
namespace {

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
  int64_t pred_stride, grad_stride, term_strides[kMaxTerms];  // of the batch, in vectors
  Row confidence, mask, weighting;
  float omega, slope;  // without maps
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
  uint32_t terms[C::kTerms][C::kTermBytes / 4];
};

// Where a thread reads its vector, and where its gradient goes.
template <typename C>
struct Places {
  const char* pred;
  char* grad;
  const char* terms[C::kTerms];

  __device__ __forceinline__ Places(const Params& p, int64_t b, int32_t at)
      : pred(static_cast<const char*>(p.pred) + (b * p.pred_stride + at) * 16),
        grad(static_cast<char*>(p.grad) + (b * p.grad_stride + at) * 16) {
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k)
      terms[k] = static_cast<const char*>(p.terms[k]) + (b * p.term_strides[k] + at) * C::kTermBytes;
  }
  // The vector that is `ahead` of it.
  __device__ __forceinline__ void load(const Params& p, int64_t ahead, Vector<C>& x) const {
    load_bytes<16, true>(pred + ahead * 16, x.pred);
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) {
      if (k == 2 && p.terms_used < 3) break;
      load_bytes<C::kTermBytes, true>(terms[k] + ahead * C::kTermBytes, x.terms[k]);
    }
  }
  __device__ __forceinline__ void store(int64_t ahead, const uint32_t (&word)[4]) const {
    store_bytes<16>(grad + ahead * 16, word);
  }
  __device__ __forceinline__ void advance(int64_t ahead) {
    pred += ahead * 16;
    grad += ahead * 16;
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) terms[k] += ahead * C::kTermBytes;
  }
};

// What the maps say of a thread's positions. Zero means left out.
template <typename C>
struct Factors {
  float loss[C::kMaps ? C::kWidth : 1];   // omega * v, element-wise v
  float slope[C::kMaps ? C::kWidth : 1];  // of the gradient, its sample's factor included
  float level[C::kLevels ? C::kWidth : 1];
  float least;  // |slope|: 0 if any is, as it is where `loss` is; not looked for where registers are short
};

// level / 255, correctly rounded for every level.
__device__ __forceinline__ float level_of_byte(uint32_t level) {
  const float x = static_cast<float>(level), q = x * (1.0f / 255.0f);
  return fmaf(fmaf(-255.0f, q, x), 1.0f / 255.0f, q);
}

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

template <typename C>
__device__ __forceinline__ void make_factors(const Params& p, int64_t b, int32_t at, float gradient_scale,
                                             Factors<C>& f) {
  constexpr int N = C::kWidth;
  const Line<float> gradients{p.gradients.clean * gradient_scale, p.gradients.step * gradient_scale};
  float value[N];
  f.least = 0;
  load_row<N>(p.confidence, b, at, 0, value);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float most = fminf(value[j], 1.0f), u = value[j] >= p.threshold ? most : 0.0f;
    f.loss[j] = at_level(p.weights, u);
    f.slope[j] = at_level(gradients, u);
    if (C::kLevels) f.level[j] = u;
  }
  if (p.mask.data != nullptr) {
    load_row<N>(p.mask, b, at, 1, value);
#pragma unroll
    for (int j = 0; j < N; ++j) f.loss[j] *= region(value[j]);
  }
  if (p.weighting.data != nullptr) {
    load_row<N>(p.weighting, b, at, 1, value);
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

// A thread's `count` vectors, `stride` apart: as soon as one is computed on, its successor is loaded.
template <typename C>
struct Stream {
  const Params& p;
  Places<C> places;
  int64_t apart;
  int32_t count;
  Vector<C> x[C::kUnroll];

  __device__ __forceinline__ Stream(const Params& params, const Places<C>& first, int32_t stride, int32_t vectors)
      : p(params), places(first), apart(stride), count(vectors) {
#pragma unroll
    for (int u = 0; u < C::kUnroll; ++u)
      if (u < count) places.load(p, u * step(), x[u]);
  }
  __device__ __forceinline__ int64_t step() const { return C::kMaps ? apart : kThreads; }
  __device__ __forceinline__ void run(const SampleNumbers<C::kTerms>& sample, const Factors<C>& f, float& sum) {
#pragma unroll 1
    for (; count > 0; count -= C::kUnroll, places.advance(C::kUnroll * step())) {
#pragma unroll
      for (int u = 0; u < C::kUnroll; ++u) {
        if (u >= count) break;
        Packed<C::kPred, C::kWidth> packed;
        compute<C>(p, sample, x[u], f, sum, packed);
        if (p.writes_grad) places.store(u * step(), packed.word);
        if (u + C::kUnroll < count) places.load(p, (u + C::kUnroll) * step(), x[u]);
      }
    }
  }
  // The gradient of a sample that is left out.
  __device__ __forceinline__ void clear() {
    constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (; p.writes_grad && count > 0; --count, places.advance(step())) places.store(0, kZeros);
  }
};

__device__ __forceinline__ int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// One block for each tile, one row of blocks for each sample.
template <typename C>
__global__ void __launch_bounds__(kThreads, C::kBlocks) l2_kernel(const __grid_constant__ Params p, void* workspace) {
  const L2Tiling& t = p.t;
  const unsigned b = blockIdx.y;
  const auto tile = static_cast<int32_t>(blockIdx.x);
  const SampleNumbers<C::kTerms> sample(p, b);
  float sum = 0;
  if constexpr (C::kMaps) {
    const int32_t columns = 1 << t.column_bits, rows = kThreads >> t.column_bits;
    const int32_t row = static_cast<int32_t>(threadIdx.x) >> t.column_bits;
    const int32_t piece = tile / t.groups, group = tile - piece * t.groups;
    const int32_t free = group * t.frees_per_group + row;
    const int32_t left = smaller(t.frees - free, t.frees_per_group - row);
    const int32_t visits = left <= 0 ? 0 : (left + rows - 1) / rows;
    int32_t column = piece * t.steps * columns + (static_cast<int32_t>(threadIdx.x) & (columns - 1));
    Places<C> start(p, b, free * t.vectors + column);
    const int32_t stride = rows * t.vectors;
#pragma unroll 1
    for (int32_t step = 0; step < t.steps && column < t.vectors; ++step, column += columns) {
      if (C::kMore) start = Places<C>(p, b, free * t.vectors + column);  // registers are short
      Stream<C> stream(p, start, stride, visits);
      if (!C::kMore) start.advance(columns);
      if (sample.left_out) {
        stream.clear();
        continue;
      }
      Factors<C> f;
      make_factors<C>(p, b, column, sample.gradient_scale, f);
      stream.run(sample, f, sum);
    }
  } else {
    const int32_t first = tile * t.steps * kThreads + static_cast<int32_t>(threadIdx.x);
    const int32_t left = t.vectors - first;
    const int32_t vectors = left <= 0 ? 0 : smaller(t.steps, (left + kThreads - 1) / kThreads);
    Stream<C> stream(p, Places<C>(p, b, first), kThreads, vectors);
    if (sample.left_out) {
      stream.clear();
    } else {
      Factors<C> f;
      f.slope[0] = p.slope * sample.gradient_scale;
      stream.run(sample, f, sum);
    }
    sum *= p.omega;
  }
  if (p.writes_loss) finish(p, t.tiles, b, sum, workspace);
}

bool is_row(bool present, int32_t dtype, const int64_t (&stride)[kMaxDims]) {
  return !present || (dtype != kFloat64 && stride[kMaxDims - 1] == 1);
}

bool is_row(const Map& map) {
  return map.mode == kAbsent || (map.mode == kSame && is_row(true, map.dtype, map.stride));
}

// N elements from `data` on, in every sample, start at an aligned address.
bool is_aligned(const void* data, int64_t batch_stride, int32_t dtype, int64_t batch, int width) {
  const int64_t bytes = width * dtype_bytes(dtype);
  return reinterpret_cast<uintptr_t>(data) % (bytes < 16 ? bytes : 16) == 0 &&
         (batch == 1 || batch_stride % width == 0);
}

Row row(const void* data, int64_t batch_stride, int32_t dtype, bool present) {
  return {present ? data : nullptr, batch_stride, dtype};
}

Params params_of(const WeightedLossParams& p) {
  const int64_t width = vector_width(p.dtype);
  Params q{};
  static_cast<Numbers&>(q) = numbers_of(p);
  q.t = l2_tiling(p);
  q.pred = p.pred.data;
  q.grad = p.grad.data;
  q.pred_stride = p.pred.batch_stride / width;
  q.grad_stride = p.grad.batch_stride / width;
  for (int k = 0; k < kMaxTerms; ++k) {
    q.terms[k] = p.terms[k].data;
    q.term_strides[k] = p.terms[k].batch_stride / width;
  }
  q.confidence = row(p.confidence.data, p.confidence.batch_stride, p.confidence.dtype, p.confidence.mode != kAbsent);
  q.mask = row(p.mask.data, p.mask.batch_stride, p.mask.dtype, p.mask.mode != kAbsent);
  q.weighting = row(p.weighting.data, p.weighting.batch_stride, p.weighting.dtype, p.weighting.present != 0);
  q.omega = q.weights.clean;
  q.slope = q.weights.clean * q.gradients.clean;
  return q;
}

bool has_maps(const WeightedLossParams& p) {
  return p.confidence.mode != kAbsent || p.mask.mode != kAbsent || p.weighting.present != 0;
}

template <int32_t kPred, int32_t kTerm>
const char* launch_for(const WeightedLossParams& p, void* workspace, void* stream) {
  const Params q = params_of(p);
  const bool more = p.num_terms > 1;
  if (!has_maps(p)) {
    return more ? launch_rows<l2_kernel<Config<kPred, kTerm, true, false, false>>>(q.t.tiles, p.batch, stream, q,
                                                                                   workspace)
                : launch_rows<l2_kernel<Config<kPred, kTerm, false, false, false>>>(q.t.tiles, p.batch, stream, q,
                                                                                    workspace);
  }
  if (p.spatial_coefs)
    return launch_rows<l2_kernel<Config<kPred, kTerm, true, true, true>>>(q.t.tiles, p.batch, stream, q, workspace);
  return more
             ? launch_rows<l2_kernel<Config<kPred, kTerm, true, true, false>>>(q.t.tiles, p.batch, stream, q, workspace)
             : launch_rows<l2_kernel<Config<kPred, kTerm, false, true, false>>>(q.t.tiles, p.batch, stream, q,
                                                                                workspace);
}

}  // namespace

bool l2_serves(const WeightedLossParams& p) {
  if (!p.contiguous || !has_plain_numbers(p)) return false;
  const Tiling t = make_tiling(p, true);
  const int width = vector_width(p.dtype);
  if (t.outers_per_tile != 0 || t.outer != 1 || t.inner % width != 0 || p.count / width > INT32_MAX / 2) return false;
  // Left out altogether: nothing to be fast at.
  if (!t.spatial) return !p.spatial_coefs && p.clean_weight != 0 && p.clean_grad != 0;
  return t.inner == p.size[kMaxDims - 1] && p.gamma == 1 && is_row(p.confidence) && is_row(p.mask) &&
         is_row(p.weighting.present != 0, p.weighting.dtype, p.weighting.stride) &&
         (!p.weighting.present || is_narrow_float(p.weighting.dtype)) && (!p.spatial_coefs || p.num_terms > 1);
}

bool l2_serves_call(const WeightedLossParams& p) {
  if ((p.outputs & kWriteSums) || !l2_serves(p)) return false;
  const int width = vector_width(p.dtype);
  const auto aligned = [&](const auto& x) { return is_aligned(x.data, x.batch_stride, x.dtype, p.batch, width); };
  bool all = aligned(p.pred) && (!(p.outputs & kWriteGrad) || aligned(p.grad));
  for (int k = 0; k < p.num_terms; ++k) all = all && aligned(p.terms[k]);
  return all && (p.confidence.mode == kAbsent || aligned(p.confidence)) &&
         (p.mask.mode == kAbsent || aligned(p.mask)) && (!p.weighting.present || aligned(p.weighting));
}

const char* launch_l2(const WeightedLossParams& p, void* workspace, void* stream) {
  return for_dtypes(p, [&](auto dtype, auto terms) { return launch_for<dtype, terms>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
