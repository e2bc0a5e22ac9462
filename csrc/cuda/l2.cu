#include <cuda_runtime.h>

#include "cuda/l2.cuh"

namespace diffdoctor::cuda {
namespace l2 {
namespace {

// Where a thread reads its vector, and where its gradient goes.
template <typename C>
struct Places {
  const char* pred;
  char* grad;
  const char* terms[C::kTerms];

  // head: elements before the sample's first vector.
  __device__ __forceinline__ Places(const Params& p, int64_t b, int32_t at, int32_t head = 0)
      : pred(static_cast<const char*>(p.pred) + b * p.pred_stride + at * int64_t{16} + head * (16 / C::kWidth)),
        grad(static_cast<char*>(p.grad) + b * p.grad_stride + at * int64_t{16} + head * (16 / C::kWidth)) {
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k)
      terms[k] = static_cast<const char*>(p.terms[k]) + b * p.term_strides[k] + at * int64_t{C::kTermBytes} +
                 head * (C::kTermBytes / C::kWidth);
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
      make_factors(
          p, sample.gradient_scale,
          [&](const Row& row, float absent, float (&value)[C::kWidth]) {
            load_row<C::kWidth>(row, b, column, absent, value);
          },
          f);
      stream.run(sample, f, sum);
    }
  } else {
    const int32_t first = tile * t.steps * kThreads + static_cast<int32_t>(threadIdx.x);
    const int32_t head = head_of<C>(p, b);
    const int32_t left = t.vectors - (p.rest < head ? 1 : 0) - first;
    const int32_t vectors = left <= 0 ? 0 : smaller(t.steps, (left + kThreads - 1) / kThreads);
    Stream<C> stream(p, Places<C>(p, b, first, head), kThreads, vectors);
    if (sample.left_out) {
      stream.clear();
    } else {
      Factors<C> f;
      f.slope[0] = p.slope * sample.gradient_scale;
      stream.run(sample, f, sum);
    }
    if (tile == 0) visit_edges<C>(p, sample, b, head, sum);
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

bool has_maps(const WeightedLossParams& p) {
  return p.confidence.mode != kAbsent || p.mask.mode != kAbsent || p.weighting.present != 0;
}

// Whether vectors of `x` and of model_pred start at the same elements.
bool has_phase(const WeightedLossParams& p, const Operand& x) {
  const int64_t width = vector_width(p.dtype);
  const auto phase = [&](const Operand& y) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(y.data)) / dtype_bytes(y.dtype) % width;
  };
  return phase(x) == phase(p.pred) && (p.batch == 1 || (x.batch_stride - p.pred.batch_stride) % width == 0);
}

// call(condition on a tensor) for all that a call reads and writes but its maps.
template <typename condition_t>
bool all_of(const WeightedLossParams& p, const condition_t& condition) {
  bool all = condition(p.pred) && (!(p.outputs & kWriteGrad) || condition(p.grad));
  for (int k = 0; k < p.num_terms; ++k) all = all && condition(p.terms[k]);
  return all;
}

// Whether all runs start at vectors.
bool is_even(const WeightedLossParams& p) {
  const int width = vector_width(p.dtype);
  const auto aligned = [&](const auto& x) { return is_aligned(x, p.batch, width); };
  return make_tiling(p, true).inner % width == 0 && all_of(p, aligned) &&
         (p.confidence.mode == kAbsent || aligned(p.confidence)) && (p.mask.mode == kAbsent || aligned(p.mask)) &&
         (!p.weighting.present || aligned(p.weighting));
}

template <int32_t kPred, int32_t kTerm>
const char* launch_for(const WeightedLossParams& p, void* workspace, void* stream) {
  const Params q = params_of(p, l2_tiling(p, true));
  const auto run = [&](auto more, auto maps, auto levels) {
    return launch_rows<l2_kernel<Config<kPred, kTerm, more, maps, levels>>>(q.t.tiles, p.batch, stream, q, workspace);
  };
  if (has_maps(p)) return for_kinds_with_maps(p, run);
  const std::false_type no;
  return p.num_terms > 1 ? run(std::true_type(), no, no) : run(no, no, no);
}

}  // namespace
}  // namespace l2

bool l2_serves(const WeightedLossParams& p) {
  if (!p.contiguous || !has_plain_numbers(p)) return false;
  const Tiling t = make_tiling(p, true);
  const int width = vector_width(p.dtype);
  if (t.outers_per_tile != 0 || t.outer != 1 || t.inner < width || p.count / width > INT32_MAX / 2) return false;
  if (t.inner % width != 0 && p.count > kMostOdd) return false;
  // Left out altogether: nothing to be fast at.
  if (!t.spatial) return !p.spatial_coefs && p.clean_weight != 0 && p.clean_grad != 0;
  return t.inner == p.size[kMaxDims - 1] && p.gamma == 1 && l2::is_row(p.confidence) && l2::is_row(p.mask) &&
         l2::is_row(p.weighting.present != 0, p.weighting.dtype, p.weighting.stride) &&
         (!p.weighting.present || is_narrow_float(p.weighting.dtype)) && (!p.spatial_coefs || p.num_terms > 1);
}

bool l2_serves_call(const WeightedLossParams& p) {
  if ((p.outputs & kWriteSums) || !l2_serves(p)) return false;
  return l2::is_even(p) ||
         (p.count <= kMostOdd && l2::all_of(p, [&](const Operand& x) { return l2::has_phase(p, x); }));
}

int64_t l2_tiles(const WeightedLossParams& p) {
  if (p.count > kMostOdd) return l2_tiling(p, true).tiles;
  return std::max(l2_tiling(p, true).tiles, l2_tiling(p, false).tiles);
}

const char* launch_l2(const WeightedLossParams& p, void* workspace, void* stream) {
  if (l2::has_maps(p) && !l2::is_even(p)) return launch_l2_odd(p, workspace, stream);
  return for_dtypes(p, [&](auto dtype, auto terms) { return l2::launch_for<dtype, terms>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
