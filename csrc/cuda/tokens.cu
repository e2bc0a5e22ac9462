#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tokens.h"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda {
namespace {

// Where the two rows of a token's channel lie, in bytes.
struct Pairs {
  const char* data;
  int64_t batch, row, column, channel, second;
};

struct Params : Numbers {
  TokenTiling t;
  const char* pred;
  char* grad;
  int64_t pred_stride, grad_stride;  // of the batch, in bytes
  Pairs terms[kMaxTerms];
  Map maps[2];  // confidence and mask
  Operand weighting;
  GridSize grid;
  float gamma;
};

template <int32_t kPredDtype, int32_t kTermDtype>
struct Config {
  static constexpr int32_t kPred = kPredDtype, kTerm = kTermDtype;
  static constexpr int kBytes = kPred == kFloat32 ? 16 : 8;  // of a channel of a token: 4 elements
  static constexpr int kPair = kTerm == kFloat32 ? 8 : 4;    // of two elements of a term
  static constexpr int kUnroll = kBytes + 2 * kPair <= 16 ? 4 : 2;
};

// One channel of a token.
template <typename C>
struct Channel {
  uint32_t pred[C::kBytes / 4];
  uint32_t terms[kMaxTerms][C::kPair / 2];
};

// A thread's walk over every fourth channel.
template <typename C>
struct Walk {
  const Params& p;
  const char* pred;
  char* grad;
  const char* terms[kMaxTerms];

  __device__ __forceinline__ Walk(const Params& params, int64_t b, int32_t token, int32_t y, int32_t x, int32_t channel)
      : p(params) {
    const int64_t at = (static_cast<int64_t>(token) * p.t.channels + channel) * C::kBytes;
    pred = p.pred + b * p.pred_stride + at;
    grad = p.grad + b * p.grad_stride + at;
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      const Pairs& from = p.terms[k];
      terms[k] = from.data + b * from.batch + y * from.row + x * from.column + channel * from.channel;
    }
  }
  // The channel that is `ahead` times four behind the next.
  __device__ __forceinline__ void load(int ahead, Channel<C>& to) const {
    load_bytes<C::kBytes, true>(pred + ahead * 4 * C::kBytes, to.pred);
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k >= p.terms_used) break;
      const char* first = terms[k] + ahead * 4 * p.terms[k].channel;
      load_bytes<C::kPair, true>(first, to.terms[k]);
      load_bytes<C::kPair, true>(first + p.terms[k].second, to.terms[k] + C::kPair / 4);
    }
  }
  __device__ __forceinline__ void advance(int by) {
    pred += by * 4 * C::kBytes;
    grad += by * 4 * C::kBytes;
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) terms[k] += by * 4 * p.terms[k].channel;
  }
};

// What maps and weighting say of a position; zero means left out.
struct Factors {
  float loss, slope, level;
};

// A map at the lane's own of the token's four positions.
__device__ __forceinline__ float value_of(const Params& p, const Map& map, int64_t b, int32_t row, int32_t column,
                                          int lane) {
  const int64_t second = lane / 2, right = lane % 2;
  if (map.mode != kSame) return resampled_value<float>(map, p.grid, b, 0, 2 * row + second, 2 * column + right);
  const int64_t at = row * map.stride[1] + column * map.stride[2] + second * map.stride[4] + right * map.stride[5];
  const int64_t index = b * map.batch_stride + at;
  if (map.dtype == kFloat32) return __ldg(static_cast<const float*>(map.data) + index);
  return load_element<float>(map.data, map.dtype, index);
}

// Of the lane's own of the token's four positions.
__device__ __forceinline__ Factors factors_of(const Params& p, int64_t b, int32_t row, int32_t column, int lane) {
  float c = 0, k = 1;
#pragma unroll 1
  for (int map = 0; map < 2; ++map) {  // compiled once for both
    if (p.maps[map].mode == kAbsent) continue;
    const float value = value_of(p, p.maps[map], b, row, column, lane);
    (map == 0 ? c : k) = value;
  }
  float u = c >= p.threshold ? fminf(c, 1.0f) : 0.0f;
  if (p.gamma != 1 && u != 0) u = std::pow(u, p.gamma);
  float v = 1;
  if (p.weighting.present) {
    const int64_t (&stride)[kMaxDims] = p.weighting.stride;
    const int64_t at = row * stride[1] + column * stride[2] + lane / 2 * stride[4] + lane % 2 * stride[5];
    v = load_element<float>(p.weighting.data, p.weighting.dtype, b * p.weighting.batch_stride + at);
  }
  const float omega = region(k) * at_level(p.weights, u);
  const float loss = omega == 0 || v == 0 ? 0.0f : omega * v, m = at_level(p.gradients, u);
  return {loss, loss == 0 || m == 0 ? 0.0f : loss * m, u};
}

// Those of all four, from the lanes that share the token.
__device__ __forceinline__ void share(const Factors& own, Factors (&all)[4]) {
  const int first = static_cast<int>(threadIdx.x) & 28;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    all[j].loss = __shfl_sync(0xffffffffu, own.loss, first + j);
    all[j].slope = __shfl_sync(0xffffffffu, own.slope, first + j);
    all[j].level = __shfl_sync(0xffffffffu, own.level, first + j);
  }
}

template <typename C>
__device__ __forceinline__ void compute(const Params& p, const SampleNumbers<kMaxTerms>& sample, const Channel<C>& x,
                                        const Factors (&f)[4], const float (&coefs)[kMaxTerms][4], char* grad,
                                        float& sum) {
  float d[4], value[4];
  unpack_all<C::kPred, 4>(x.pred, 0, d);
  if (p.scales_pred) {
#pragma unroll
    for (int j = 0; j < 4; ++j) d[j] *= sample.pred_scale;
  }
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= p.terms_used) break;
    unpack_all<C::kTerm, 4>(x.terms[k], 0, value);
#pragma unroll
    for (int j = 0; j < 4; ++j) d[j] -= coefs[k][j] * value[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sum += f[j].loss == 0 ? 0.0f : f[j].loss * d[j] * d[j];
  if (!p.writes_grad) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) d[j] = f[j].slope == 0 ? 0.0f : f[j].slope * d[j];
  Packed<C::kPred, 4> packed;
  pack<C::kPred, float, 4>(d, 0, packed);
  store_bytes<C::kBytes>(grad, packed.word);
}

// One block for each tile, one row of blocks for each sample. The four lanes of a token read 32 bytes of model_pred,
// the eight tokens of a warp 32 bytes of a row of latents.
template <typename C>
__global__ void __launch_bounds__(kThreads, 2) tokens_kernel(const __grid_constant__ Params p, void* workspace) {
  const TokenTiling& t = p.t;
  const unsigned b = blockIdx.y;
  const auto tile = static_cast<int32_t>(blockIdx.x);
  const int32_t piece = tile / t.groups, group = tile - piece * t.groups;
  const int lane = static_cast<int>(threadIdx.x) % 4;
  const int32_t token = piece * kTokensPerBlock + static_cast<int32_t>(threadIdx.x) / 4;
  const int32_t row = token / t.columns, column = token - row * t.columns;
  const int32_t channel = group * t.channels_per_group + lane;
  const int32_t most = group * t.channels_per_group + t.channels_per_group;
  const int32_t left = token < t.tokens ? (most < t.channels ? most : t.channels) - channel : 0;
  int32_t count = left <= 0 ? 0 : (left + 3) / 4;
  Walk<C> walk(p, b, token, row, column, channel);
  Channel<C> x[C::kUnroll];
#pragma unroll
  for (int u = 0; u < C::kUnroll; ++u)
    if (u < count) walk.load(u, x[u]);

  const SampleNumbers<kMaxTerms> sample(p, b);
  Factors own{0, 0, 0}, f[4];
  if (token < t.tokens && !sample.left_out) own = factors_of(p, b, row, column, lane);
  own.slope *= own.slope == 0 ? 1.0f : sample.gradient_scale;
  share(own, f);
  float coefs[kMaxTerms][4];
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j) coefs[k][j] = at_level(sample.coefs[k], f[j].level);

  float sum = 0;
#pragma unroll 1
  for (; count > 0; count -= C::kUnroll, walk.advance(C::kUnroll)) {
#pragma unroll
    for (int u = 0; u < C::kUnroll; ++u) {
      if (u >= count) break;
      compute<C>(p, sample, x[u], f, coefs, walk.grad + u * 4 * C::kBytes, sum);
      if (u + C::kUnroll < count) walk.load(u + C::kUnroll, x[u]);
    }
  }
  if (p.writes_loss) finish(p, t.tiles, b, sum, workspace);
}

template <int32_t kPred, int32_t kTerm>
const char* launch_for(const WeightedLossParams& p, void* workspace, void* stream) {
  const int64_t bytes = dtype_bytes(kPred), term_bytes = dtype_bytes(kTerm);
  Params q{};
  static_cast<Numbers&>(q) = numbers_of(p);
  q.t = token_tiling(p);
  q.pred = static_cast<const char*>(p.pred.data);
  q.grad = static_cast<char*>(p.grad.data);
  q.pred_stride = p.pred.batch_stride * bytes;
  q.grad_stride = p.grad.batch_stride * bytes;
  for (int k = 0; k < p.num_terms; ++k) {
    const int64_t (&stride)[kMaxDims] = p.terms[k].stride;
    q.terms[k] = {static_cast<const char*>(p.terms[k].data),
                  p.terms[k].batch_stride * term_bytes,
                  stride[1] * term_bytes,
                  stride[2] * term_bytes,
                  stride[3] * term_bytes,
                  stride[4] * term_bytes};
  }
  q.maps[0] = p.confidence;
  q.maps[1] = p.mask;
  q.weighting = p.weighting;
  for (int axis = 0; axis < 3; ++axis) q.grid[axis] = p.grid[axis];
  q.gamma = static_cast<float>(p.gamma);
  return launch_rows<tokens_kernel<Config<kPred, kTerm>>>(q.t.tiles, p.batch, stream, q, workspace);
}

bool is_token(const Operand& x, const WeightedLossParams& p) {
  const int64_t token = 4 * p.size[3];
  return x.stride[5] == 1 && x.stride[4] == 2 && x.stride[3] == 4 && x.stride[2] == token &&
         x.stride[1] == token * p.size[2];
}

bool changes_along_channels(const WeightedLossParams& p) {
  return p.map_varies[3] || (p.weighting.present && p.weighting.stride[3] != 0);
}

}  // namespace

bool tokens_serve(const WeightedLossParams& p) {
  if (p.ndim != 5 || p.size[4] != 2 || p.size[5] != 2 || p.count >= (int64_t{1} << 31)) return false;
  if (!has_plain_numbers(p) || !is_token(p.pred, p) || !is_token(p.grad, p) || changes_along_channels(p)) return false;
  // The grid's rows and columns are those of two tokens' halves, and not of some other dims that happen to fit.
  const bool resampled = p.confidence.mode > kSame || p.mask.mode > kSame;
  if (resampled && (p.coord[1][1] != 2 || p.coord[1][4] != 1 || p.coord[2][2] != 2 || p.coord[2][5] != 1)) return false;
  for (int k = 0; k < p.num_terms; ++k) {
    const int64_t (&stride)[kMaxDims] = p.terms[k].stride;
    if (stride[5] != 1) return false;
    for (int d = 1; d < 5; ++d)
      if (stride[d] % 2 != 0) return false;
  }
  return true;
}

bool tokens_serve_call(const WeightedLossParams& p) {
  if ((p.outputs & kWriteSums) || !tokens_serve(p) || !is_aligned(p.pred, p.batch, 4)) return false;
  for (int k = 0; k < p.num_terms; ++k)
    if (!is_aligned(p.terms[k], p.batch, 2)) return false;
  return !(p.outputs & kWriteGrad) || is_aligned(p.grad, p.batch, 4);
}

const char* launch_tokens(const WeightedLossParams& p, void* workspace, void* stream) {
  return for_dtypes(p, [&](auto dtype, auto terms) { return launch_for<dtype, terms>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
