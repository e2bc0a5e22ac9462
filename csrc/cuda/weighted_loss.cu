// weighted_loss in one launch: the loss, its gradient and the sums behind LossStats. What l2.cu or tokens.cu
// serves goes there.
#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/l2.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/tokens.h"
#include "cuda/vector.cuh"
#include "cuda/weighted_loss.h"

namespace diffdoctor::cuda {
namespace {

template <int32_t kPredDtype, bool kVectorised>
struct Config {
  static constexpr int32_t kDtype = kPredDtype;
  static constexpr bool kVector = kVectorised;
  static constexpr int kBlocks = kPredDtype == kFloat64 ? 1 : 2;  // of a multiprocessor
  using acc_t = std::conditional_t<kPredDtype == kFloat64, double, float>;
  static constexpr int kWidth = kVectorised ? vector_width(kPredDtype) : 1;
  static constexpr int kStep = kWidth < 16 / sizeof(acc_t) ? kWidth : 16 / sizeof(acc_t);
  static constexpr int kPositions = tile_positions(kPredDtype);
};
constexpr int kLaterTerms = kMaxTerms - 1;

// The factors of one position, in shared memory. Zero means left out.
template <typename acc_t>
struct Factors {
  acc_t loss;   // v_b * v * omega
  acc_t slope;  // v * omega * m
  acc_t level;  // u; where the sums or the coefficients want it

  __device__ __forceinline__ Factors(const Position<acc_t>& at, const Sample<acc_t>& sample) {
    const bool selected = sample.selected && at.omega != 0 && at.weighting != 0;
    loss = selected ? sample.v * at.weighting * at.omega : acc_t(0);
    slope = selected && at.m != 0 ? at.weighting * at.omega * at.m : acc_t(0);
    level = at.u;
  }
};

// The columns of `sums`, in the order of the partial sums: first those that are added up over elements, then those that
// the positions alone decide.
enum ElementSum { kNumerator, kArtifactLoss, kCleanLoss, kNonfinite, kElementSums };
enum PositionSum { kWeight, kArtifactWeight, kCleanWeight, kArtifact, kNan, kOutside, kPositionSums };
constexpr int kColumns = kElementSums + kPositionSums;

template <typename acc_t>
__device__ __forceinline__ void add_position(const Position<acc_t>& at, const Factors<acc_t>& factors, acc_t elements,
                                             acc_t (&sums)[kPositionSums]) {
  sums[kWeight] += elements * at.omega;
  sums[kArtifact] += elements * at.u;
  if (at.nan) sums[kNan] += elements;
  if (at.outside) sums[kOutside] += elements;
  if (factors.loss == 0) return;
  sums[kArtifactWeight] += elements * at.u;
  sums[kCleanWeight] += elements * (1 - at.u);
}

// kWidth consecutive elements on their way through a thread, which computes on kStep of them at a time.
template <typename C>
struct Unit {
  using acc_t = typename C::acc_t;
  int64_t grad_at, later_at[kLaterTerms];
  int s, q, r;  // position in the tile; its place within `inner` and within `free * inner`
  Raw<acc_t, C::kWidth> pred, term;
};

// Registers are short: the second and third term, which few targets have, are loaded when their turn comes.
template <typename C>
__device__ __forceinline__ Raw<typename C::acc_t, C::kWidth> load_term(const WeightedLossParams& p, int k, int64_t at) {
  return load_raw<typename C::acc_t, C::kWidth>(p.terms[k].data, p.terms[k].dtype, at);
}

template <typename C>
__device__ __forceinline__ void load_unit(const WeightedLossParams& p, const Tiling& t, const Tile& tile, int64_t b,
                                          int index, Unit<C>& unit) {
  using acc_t = typename C::acc_t;
  int64_t i;
  if (t.outers_per_tile == 0) {
    const unsigned per_run = static_cast<unsigned>(tile.positions + C::kWidth - 1) / C::kWidth;
    const unsigned f = static_cast<unsigned>(index) / per_run;
    unit.s = static_cast<int>(static_cast<unsigned>(index) - f * per_run) * C::kWidth;
    unit.q = unit.r = 0;
    i = tile.first + (tile.free_begin + static_cast<int64_t>(f)) * t.inner + unit.s;
  } else {
    const unsigned inner = static_cast<unsigned>(t.inner), row = static_cast<unsigned>(t.free) * inner;
    const unsigned e = static_cast<unsigned>(index) * C::kWidth;
    const unsigned o = e / row;
    unit.r = static_cast<int>(e - o * row);
    unit.q = static_cast<int>(static_cast<unsigned>(unit.r) % inner);
    unit.s = static_cast<int>(o * inner) + unit.q;
    i = tile.first + e;
  }
  int64_t pred_at = i, term_at = i;
  unit.grad_at = i;
#pragma unroll
  for (int k = 0; k < kLaterTerms; ++k) unit.later_at[k] = i;
  if (!C::kVector && !p.contiguous) {
    pred_at = term_at = unit.grad_at = 0;
#pragma unroll
    for (int k = 0; k < kLaterTerms; ++k) unit.later_at[k] = 0;
    decode(p, t.narrow != 0, i, [&](int d, int64_t at) {
      pred_at += at * p.pred.stride[d];
      term_at += at * p.terms[0].stride[d];
      unit.grad_at += at * p.grad.stride[d];
#pragma unroll
      for (int k = 0; k < kLaterTerms; ++k) unit.later_at[k] += at * p.terms[1 + k].stride[d];
    });
  }
  unit.grad_at += b * p.grad.batch_stride;
#pragma unroll
  for (int k = 0; k < kLaterTerms; ++k) unit.later_at[k] += b * p.terms[1 + k].batch_stride;
  unit.pred = load_raw<acc_t, C::kWidth>(p.pred.data, C::kDtype, b * p.pred.batch_stride + pred_at);
  if (p.num_terms > 0) unit.term = load_term<C>(p, 0, b * p.terms[0].batch_stride + term_at);
}

// Where the factors of consecutive elements stand in shared memory.
struct Cursor {
  int s, q, r, inner, row;

  __device__ __forceinline__ void advance() {
    ++s, ++q, ++r;
    if (q == inner) q = 0, s -= inner;  // the next f: the same positions again ...
    if (r == row) r = 0, s += inner;    // ... unless it is the next o
  }
};

template <typename acc_t, int N>
__device__ __forceinline__ void load_factor(bool rows, const acc_t* shared, Cursor cursor, acc_t (&value)[N]) {
  if (rows) {
    load_shared<acc_t, N>(shared + cursor.s, value);
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    value[j] = shared[cursor.s];
    cursor.advance();
  }
}

template <typename acc_t, int N>
__device__ __forceinline__ void add_level_sums(const acc_t (&factor)[N], const acc_t (&level)[N],
                                               const acc_t (&loss)[N], acc_t (&sums)[kElementSums]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (factor[j] == 0) continue;
    if (level[j] != 0) sums[kArtifactLoss] += level[j] * loss[j];
    if (level[j] != 1) sums[kCleanLoss] += (1 - level[j]) * loss[j];
    // Finite minus itself is 0; infinity and NaN give NaN.
    const acc_t term = factor[j] * loss[j];
    sums[kNonfinite] += term - term == 0 ? acc_t(0) : acc_t(1);
  }
}

// d -= coefficient * term.
template <typename acc_t, int N>
__device__ __forceinline__ void subtract_term(const Line<acc_t>& coef, const acc_t (&term)[N], const acc_t (&level)[N],
                                              acc_t (&d)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) d[j] -= at_level(coef, level[j]) * term[j];
}

template <typename C>
__device__ __forceinline__ void compute_unit(const WeightedLossParams& p, const Tiling& t, const Mixture& mixture,
                                             const Sample<typename C::acc_t>& sample,
                                             const Factors<typename C::acc_t>& uniform,
                                             const typename C::acc_t (&shared)[3][C::kPositions], const Unit<C>& unit,
                                             typename C::acc_t (&sums)[kElementSums]) {
  using acc_t = typename C::acc_t;
  constexpr int N = C::kStep;
  const bool rows = t.outers_per_tile == 0;
  const bool levels = t.spatial && (p.spatial_coefs || (p.outputs & kWriteSums));
  Cursor cursor{unit.s, unit.q, unit.r, static_cast<int>(t.inner), static_cast<int>(t.free * t.inner)};
  Packed<C::kDtype, C::kWidth> packed;
  Raw<acc_t, C::kWidth> later[kLaterTerms];
#pragma unroll
  for (int k = 0; k < kLaterTerms; ++k)
    if (p.num_terms > 1 + k) later[k] = load_term<C>(p, 1 + k, unit.later_at[k]);
#pragma unroll
  for (int step = 0; step < C::kWidth; step += N) {
    acc_t d[N], value[N], level[N], loss[N], slope[N];
    const auto load_level = [&](acc_t(&of)[N]) {
#pragma unroll
      for (int j = 0; j < N; ++j) of[j] = uniform.level;
      if (levels) load_factor<acc_t, N>(rows, shared[2], cursor, of);
    };
    unpack<acc_t, N>(unit.pred, step, C::kDtype, d);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] *= sample.pred_scale;
    load_level(level);
    if (p.num_terms > 0) {
      unpack<acc_t, N>(unit.term, step, p.terms[0].dtype, value);
      subtract_term<acc_t, N>(sample.coef[0], value, level, d);
    }
#pragma unroll
    for (int k = 0; k < kLaterTerms; ++k) {
      if (p.num_terms <= 1 + k) break;
      unpack<acc_t, N>(later[k], step, p.terms[1 + k].dtype, value);
      subtract_term<acc_t, N>(sample.coef[1 + k], value, level, d);
    }
    eval_losses<acc_t, N>(p, mixture, sample, d, loss, slope);
    if (p.outputs & (kWriteLoss | kWriteSums)) {
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = uniform.loss;
      if (t.spatial) load_factor<acc_t, N>(rows, shared[0], cursor, value);
      acc_t sum = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) sum += value[j] != 0 ? value[j] * loss[j] : acc_t(0);
      sums[kNumerator] += sum;
      if (p.outputs & kWriteSums) {
        add_level_sums<acc_t, N>(value, level, loss, sums);
      }
    }
    if (p.outputs & kWriteGrad) {
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = uniform.slope;
      if (t.spatial) load_factor<acc_t, N>(rows, shared[1], cursor, value);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        slope[j] = value[j] == 0 || sample.zero_grad ? acc_t(0) : value[j] * slope[j] * sample.gradient_scale;
      }
      pack<C::kDtype, acc_t, N>(slope, step, packed);
    }
    if (C::kWidth > N) {
#pragma unroll
      for (int j = 0; j < N; ++j) cursor.advance();
    }
  }
  if (p.outputs & kWriteGrad) store_packed<C::kDtype, C::kWidth>(p.grad.data, unit.grad_at, packed);
}

template <typename C>
__device__ __forceinline__ void finish(const WeightedLossParams& p, const Tiling& t, int64_t b, void* workspace,
                                       const typename C::acc_t* partials) {
  using acc_t = typename C::acc_t;
  const bool sums_wanted = (p.outputs & kWriteSums) != 0;
  const auto emit = [&](int64_t sample, const double (&sums)[kColumns]) {
    if (sums_wanted) {
      constexpr int kColumn[kColumns] = {kSumNumerator, kSumArtifactLoss,   kSumCleanLoss,   kSumNonfinite,
                                         kSumWeight,    kSumArtifactWeight, kSumCleanWeight, kSumArtifact,
                                         kSumNan,       kSumOutside};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        static_cast<acc_t*>(p.sums)[sample * kSums + kColumn[c]] = static_cast<acc_t>(sums[c]);
      }
    }
    const acc_t loss = sample_loss<acc_t>(p, sample, static_cast<acc_t>(sums[kNumerator]));
    if (p.reduction == kSample && (p.outputs & kWriteLoss)) static_cast<acc_t*>(p.loss)[sample] = loss;
    return static_cast<double>(loss);
  };
  double total;
  const int columns = sums_wanted ? kColumns : 1;
  if (!reduce_samples<kColumns>(workspace, partials, columns, p.batch, b, t.tiles, total, emit)) return;
  if ((p.outputs & kWriteLoss) && p.reduction != kSample) {
    *static_cast<acc_t*>(p.loss) =
        static_cast<acc_t>(p.reduction == kMean ? total / static_cast<double>(p.batch) : total);
  }
}

// One block for each tile.
template <typename C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    weighted_loss_kernel(const __grid_constant__ WeightedLossParams p, const __grid_constant__ Tiling t,
                         const __grid_constant__ Mixture mixture, void* workspace) {
  using acc_t = typename C::acc_t;
  alignas(16) __shared__ acc_t shared[3][C::kPositions];
  const int64_t b = blockIdx.x / t.tiles;
  const Tile tile(t, blockIdx.x - b * t.tiles);
  const int frees = tile.free_end - tile.free_begin;
  const Sample<acc_t> sample(p, b);
  const bool sums_wanted = (p.outputs & kWriteSums) != 0;
  const int columns = sums_wanted ? kColumns : 1;
  acc_t* partials = workspace_body<acc_t>(workspace, p.batch);

  // What holds everywhere when no map or weighting says otherwise.
  const Position<acc_t> everywhere = position_without_maps<acc_t>(p);
  const Factors<acc_t> uniform(everywhere, sample);
  if (t.spatial || sums_wanted) {
    acc_t sums[kPositionSums] = {};
    for (int s = threadIdx.x; t.spatial && s < tile.positions; s += kThreads) {
      const Position<acc_t> position = position_of<acc_t>(p, t.narrow != 0, b, tile.element(t, s));
      const Factors<acc_t> factors(position, sample);
      shared[0][s] = factors.loss;
      shared[1][s] = factors.slope;
      if (p.spatial_coefs || sums_wanted) shared[2][s] = factors.level;
      if (sums_wanted) add_position(position, factors, static_cast<acc_t>(frees), sums);
    }
    if (!t.spatial && threadIdx.x == 0) {
      add_position(everywhere, uniform, static_cast<acc_t>(tile.positions) * static_cast<acc_t>(frees), sums);
    }
    if (sums_wanted) store_block_sums<kPositionSums>(sums, partials, columns, kElementSums, blockIdx.x);
    __syncthreads();
  }
  acc_t sums[kElementSums] = {};

  const int units = t.outers_per_tile == 0 ? frees * ((tile.positions + C::kWidth - 1) / C::kWidth)
                                           : tile.positions * frees / C::kWidth;
  for (int index = threadIdx.x; index < units; index += kThreads) {
    Unit<C> unit;
    load_unit<C>(p, t, tile, b, index, unit);
    compute_unit<C>(p, t, mixture, sample, uniform, shared, unit, sums);
  }

  if (!(p.outputs & (kWriteLoss | kWriteSums))) return;
  store_block_sums<kElementSums>(sums, partials, columns, 0, blockIdx.x);
  finish<C>(p, t, b, workspace, partials);
}

bool can_vectorise(const WeightedLossParams& p, const Tiling& t, int width) {
  bool aligned = p.contiguous && tiles_are_aligned(p, t, width) && is_aligned(p.pred, p.batch, width);
  if (p.outputs & kWriteGrad) aligned = aligned && is_aligned(p.grad, p.batch, width);
  for (int k = 0; k < p.num_terms; ++k) aligned = aligned && is_aligned(p.terms[k], p.batch, width);
  return aligned;
}

template <int32_t kDtype>
const char* launch_for(const WeightedLossParams& p, void* workspace, void* stream) {
  const int width = vector_width(kDtype);
  const Tiling t = make_tiling(p, true);
  const int64_t blocks = p.batch * t.tiles;
  const Mixture mixture(p);
  return can_vectorise(p, t, width)
             ? launch<weighted_loss_kernel<Config<kDtype, true>>>(blocks, stream, p, t, mixture, workspace)
             : launch<weighted_loss_kernel<Config<kDtype, false>>>(blocks, stream, p, t, mixture, workspace);
}

}  // namespace

const char* device_problem() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  // Loading is no work that a capture on this thread could record, and must not break it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (error == cudaSuccess) error = cudaThreadExchangeStreamCaptureMode(&mode);
  for (const Loader load : loaders())
    if (error == cudaSuccess) error = load();
  if (devices > 0) cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int64_t weighted_loss_workspace(const WeightedLossParams& p) {
  if (!(p.outputs & (kWriteLoss | kWriteSums))) return 0;
  const int64_t columns = p.outputs & kWriteSums ? kColumns : 1;
  int64_t numbers = make_tiling(p, true).tiles * columns;
  if (l2_serves(p)) numbers = std::max(numbers, l2_tiles(p));
  if (tokens_serve(p)) numbers = std::max<int64_t>(numbers, token_tiling(p).tiles);
  return workspace_bytes(p.batch, p.batch * numbers, p.dtype == kFloat64 ? 8 : 4);
}

const char* launch_weighted_loss(const WeightedLossParams& p, void* workspace, void* stream) {
  if (l2_serves_call(p)) return launch_l2(p, workspace, stream);
  if (tokens_serve_call(p)) return launch_tokens(p, workspace, stream);
  return for_dtype(p.dtype, [&](auto dtype) { return launch_for<dtype>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
