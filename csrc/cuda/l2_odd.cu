// l2 with maps where runs are no whole number of vectors: latents of 166 x 166, odd frames. Vectors are those of the
// whole sample, whatever run they start in, so that a run's first one starts at another of its positions than the
// next run's. What the maps say stands in shared memory, from where every vector takes it at its own shift.
#include <cuda_runtime.h>

#include "cuda/l2.cuh"

namespace diffdoctor::cuda {
namespace l2 {
namespace {

// Shared memory leaves the registers to the vectors under way.
template <typename config_t>
struct Odd : config_t {
  static constexpr int kBlocks = config_t::kMore || config_t::kWidth == 4 ? 2 : 3,
                       kUnroll = config_t::kMore ? 2 : config_t::kUnroll;
  static constexpr int kBits = config_t::kWidth == 8 ? 3 : 2;  // log2 of the width
};

// Column c of a block has positions W * c ... W * c + 2 W - 1 of its piece, W a vector's width: a vector shifted by
// less than W lies in it. Columns are an odd number of pairs apart, so that the lanes of a warp meet in no bank. Two
// more are written and not read: a position's place is worked out once.
template <typename C>
struct Shared {
  static constexpr int kColumns = 1 << odd_column_bits(C::kWidth, C::kLevels), kApart = 2 * C::kWidth + 1;
  static constexpr int kPlaces = (kColumns + 2) * kApart;
  float2 factor[kPlaces];  // of the loss, of the slope
  float level[C::kLevels ? kPlaces : 1];

  static __device__ __forceinline__ int32_t place_of(int32_t column) { return (column + 1) * kApart; }
};

// What N positions say, which are read even where they are not wanted. at: of each.
template <int N>
__device__ __forceinline__ void load_positions(const Row& row, int64_t b, const int32_t (&at)[N], float absent,
                                               float (&value)[N]) {
  const int64_t first = b * row.batch_stride;
  if (row.data == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = absent;
  } else if (row.dtype == kFloat32) {
    const float* data = static_cast<const float*>(row.data) + first;
    keep_in_register(data);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = __ldg(data + at[j]);
  } else if (row.dtype == kUInt8 || row.dtype == kBool) {
    const uint8_t* data = static_cast<const uint8_t*>(row.data) + first;
    keep_in_register(data);
    uint32_t byte[N];
#pragma unroll
    for (int j = 0; j < N; ++j) byte[j] = __ldg(data + at[j]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      value[j] = row.dtype == kUInt8 ? level_of_byte(byte[j]) : byte[j] != 0 ? 1.0f : 0.0f;
    }
  } else {
    const uint16_t* data = static_cast<const uint16_t*>(row.data) + first;
    keep_in_register(data);
    uint16_t bits[N];
#pragma unroll
    for (int j = 0; j < N; ++j) bits[j] = __ldg(data + at[j]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      value[j] = row.dtype == kBFloat16 ? bfloat16_to_float(bits[j]) : float16_to_float(bits[j]);
    }
  }
}

// Works out the factors of N places of the piece that begins at position `first` of the run: k, and every kThreads'th
// one behind it. True where one is 0. kInside: all are places of the piece, and no position is behind the run's end.
template <typename C, int N, bool kInside>
__device__ __forceinline__ bool fill_places(const Params& p, int64_t b, int32_t first, int32_t k, int32_t count,
                                            float gradient_scale, Shared<C>& shared) {
  using S = Shared<C>;
  int32_t at[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int32_t place = k + j * kThreads, position = first + place;
    at[j] = kInside ? position : place >= count ? 0 : position >= p.run ? position - p.run : position;
  }
  Factors<Few<C, N>> f;
  const auto load = [&](const Row& row, float absent, float (&value)[N]) {
    load_positions<N>(row, b, at, absent, value);
  };
  make_factors(p, gradient_scale, load, f);
  const int32_t own = S::place_of(k >> C::kBits) + (k & (C::kWidth - 1)), before = own - S::kApart + C::kWidth;
  bool zeros = false;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    constexpr int kAhead = kThreads / C::kWidth * S::kApart;
    zeros |= f.slope[j] == 0;
    if (!kInside && k + j * kThreads >= count) continue;
    shared.factor[own + j * kAhead] = shared.factor[before + j * kAhead] = float2{f.loss[j], f.slope[j]};
    if (C::kLevels) shared.level[own + j * kAhead] = shared.level[before + j * kAhead] = f.level[C::kLevels ? j : 0];
  }
  return zeros;
}

// Works out the factors of a block's columns from position `first` of the run on. True where one of this thread's is 0.
// Behind a run's end stand the first positions again, which its last vector reaches into.
template <typename C>
__device__ __forceinline__ bool fill(const Params& p, int64_t b, int32_t first, int32_t columns, float gradient_scale,
                                     Shared<C>& shared) {
  constexpr int W = C::kWidth, N = 4;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), whole = columns * W;
  const int32_t count = smaller(whole + W, p.run + W - first);
  bool zeros = false;
  int32_t k = thread;
  if (first + whole <= p.run && columns == Shared<C>::kColumns) {
    constexpr int kEach = Shared<C>::kColumns * W / kThreads;
    zeros = fill_places<C, kEach, true>(p, b, first, k, count, gradient_scale, shared);
    k += whole;
  }
#pragma unroll 1
  for (; k < count; k += N * kThreads) zeros |= fill_places<C, N, false>(p, b, first, k, count, gradient_scale, shared);
  return zeros;
}

// Where a thread's vector of a run stands.
struct Place {
  int32_t at;     // vector of the sample, counted from its first; -1: there is none
  int32_t shift;  // of its first position from the column's
};

// A thread's vectors, in a column of every rows'th run: as soon as one is computed on, its successor is loaded.
template <typename C>
struct Stream {
  const Params& p;
  const char* pred;
  char* grad;
  const char* terms[C::kTerms];
  int32_t vectors;      // of the sample
  int32_t apart;        // elements between two of the runs
  int32_t column;       // of a run
  int32_t next, count;  // elements from the sample's first vector to the run that is loaded next; runs still to visit
  Vector<C> x[C::kUnroll];
  Place places[C::kUnroll];

  __device__ __forceinline__ Stream(const Params& params, int64_t b, int32_t head, int32_t rows)
      : p(params),
        pred(static_cast<const char*>(p.pred) + b * p.pred_stride + head * (16 / C::kWidth)),
        grad(static_cast<char*>(p.grad) + b * p.grad_stride + head * (16 / C::kWidth)),
        vectors(static_cast<int32_t>(p.count - head) / C::kWidth),
        apart(rows * p.run) {
    keep_in_register(pred);
    keep_in_register(grad);
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) {
      terms[k] = static_cast<const char*>(p.terms[k]) + b * p.term_strides[k] + head * (C::kTermBytes / C::kWidth);
      keep_in_register(terms[k]);
    }
    keep_in_register(apart);
  }
  // of_run: the column. first: elements from the sample's first vector to the first run of `runs`.
  __device__ __forceinline__ void start(int32_t of_run, int32_t first, int32_t runs) {
    column = of_run;
    next = first;
    count = runs;
    keep_in_register(column);
#pragma unroll
    for (int u = 0; u < C::kUnroll; ++u)
      if (u < count) load(u);
  }
  __device__ __forceinline__ Place advance() {
    const int32_t shift = -next & (C::kWidth - 1), at = ((next + shift) >> C::kBits) + column;
    const bool is_there = column * C::kWidth + shift < p.run && at < vectors;
    next += apart;
    return {is_there ? at : -1, shift};
  }
  __device__ __forceinline__ void load(int u) {
    places[u] = advance();
    const int32_t at = places[u].at;
    if (at < 0) return;
    load_bytes<16, true>(pred + at * int64_t{16}, x[u].pred);
#pragma unroll
    for (int k = 0; k < C::kTerms; ++k) {
      if (k == 2 && p.terms_used < 3) break;
      load_bytes<C::kTermBytes, true>(terms[k] + at * int64_t{C::kTermBytes}, x[u].terms[k]);
    }
  }
  // factors, levels: of the column. zeros: a factor may be 0.
  __device__ __forceinline__ void run(const SampleNumbers<C::kTerms>& sample, const float2* factors,
                                      const float* levels, bool zeros, float& sum) {
#pragma unroll 1
    for (; count > 0; count -= C::kUnroll) {
#pragma unroll
      for (int u = 0; u < C::kUnroll; ++u) {
        if (u >= count) break;
        if (places[u].at >= 0) {
          Factors<C> f;
          f.least = zeros ? 0.0f : 1.0f;
#pragma unroll
          for (int j = 0; j < C::kWidth; ++j) {
            const float2 both = factors[places[u].shift + j];
            f.loss[j] = both.x;
            f.slope[j] = both.y;
            if (C::kLevels) f.level[C::kLevels ? j : 0] = levels[places[u].shift + j];
          }
          Packed<C::kPred, C::kWidth> packed;
          compute<C>(p, sample, x[u], f, sum, packed);
          if (p.writes_grad) store_bytes<16>(grad + places[u].at * int64_t{16}, packed.word);
        }
        if (u + C::kUnroll < count) load(u);
      }
    }
  }
  // The gradient of a sample that is left out.
  __device__ __forceinline__ void clear() {
    constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
    next -= smaller(count, C::kUnroll) * apart;
#pragma unroll 1
    for (; p.writes_grad && count > 0; --count) {
      const Place place = advance();
      if (place.at >= 0) store_bytes<16>(grad + place.at * int64_t{16}, kZeros);
    }
  }
};

// One block for each tile, one row of blocks for each sample.
template <typename C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    l2_odd_kernel(const __grid_constant__ Params p, void* workspace) {
  __shared__ Shared<C> shared;
  const L2Tiling& t = p.t;
  const unsigned b = blockIdx.y;
  const auto tile = static_cast<int32_t>(blockIdx.x);
  const SampleNumbers<C::kTerms> sample(p, b);
  const int32_t head = head_of<C>(p, b);
  const int32_t columns = 1 << t.column_bits, rows = kThreads >> t.column_bits;
  const int32_t row = static_cast<int32_t>(threadIdx.x) >> t.column_bits;
  const int32_t column = static_cast<int32_t>(threadIdx.x) & (columns - 1);
  const float2* factors = shared.factor + Shared<C>::place_of(column);
  const float* levels = shared.level + (C::kLevels ? Shared<C>::place_of(column) : 0);
  keep_shared_in_register(factors);
  if (C::kLevels) keep_shared_in_register(levels);
  const int32_t piece = tile / t.groups, group = tile - piece * t.groups;
  const int32_t run = group * t.frees_per_group + row;
  const int32_t left = smaller(t.frees - run, t.frees_per_group - row);
  const int32_t visits = left <= 0 ? 0 : (left + rows - 1) / rows;
  Stream<C> stream(p, b, head, rows);
  float sum = 0;
  int32_t first = piece * t.steps * columns;
#pragma unroll 1
  for (int32_t step = 0; step < t.steps && first < t.vectors; ++step, first += columns) {
    stream.start(first + column, run * p.run - head, visits);
    if (sample.left_out) {
      stream.clear();
      continue;
    }
    if (step > 0) __syncthreads();  // the factors before have been read
    bool zeros = fill<C>(p, b, first * C::kWidth, columns, sample.gradient_scale, shared);
    zeros = __syncthreads_or(zeros) != 0;
    stream.run(sample, factors, levels, zeros, sum);
  }
  if (tile == 0) visit_edges<C>(p, sample, b, head, sum);
  if (p.writes_loss) finish(p, t.tiles, b, sum, workspace);
}

template <int32_t kPred, int32_t kTerm>
const char* launch_for(const WeightedLossParams& p, void* workspace, void* stream) {
  const Params q = params_of(p, l2_tiling(p, false));
  return for_kinds_with_maps(p, [&](auto more, auto maps, auto levels) {
    return launch_rows<l2_odd_kernel<Odd<Config<kPred, kTerm, more, maps, levels>>>>(q.t.tiles, p.batch, stream, q,
                                                                                     workspace);
  });
}

}  // namespace
}  // namespace l2

const char* launch_l2_odd(const WeightedLossParams& p, void* workspace, void* stream) {
  return for_dtypes(p, [&](auto dtype, auto terms) { return l2::launch_for<dtype, terms>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
