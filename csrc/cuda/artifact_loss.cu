// artifact_loss: logits up-sampled bilinearly, through a sigmoid, reduced per picture. The up-sampled map exists only
// piece by piece in shared memory, where each logit gathers its own gradient from the pixels that it touches, so that
// nothing is added atomically.
#include <cuda_runtime.h>

#include "common/resample.h"
#include "cuda/arithmetic.cuh"
#include "cuda/artifact_loss.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tiling.h"

namespace diffdoctor::cuda {
namespace {

// A block has a tile of logits, a thread each.
constexpr int kSide = 16;
// A piece of the up-sampled map in shared memory: pixels, and rows and columns at most. 68 x 68 is what a tile touches
// where the map is four times as large.
constexpr int kPixels = 4624, kLines = 128;

struct Grid {
  int32_t tiles_x;
  int32_t blocks_per_sample;
};

Grid grid_of(const ArtifactLossParams& p) {
  const int64_t tiles_x = ceil_div(p.in_w, kSide);
  return {static_cast<int32_t>(tiles_x), static_cast<int32_t>(tiles_x * ceil_div(p.in_h, kSide))};
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

// Where an output position along an axis lies between input positions; in 32 bits, and with a scale that is worked out
// once.
template <typename acc_t>
struct Axis {
  int32_t in, out;
  acc_t scale;

  __device__ __forceinline__ Axis(int64_t in_size, int64_t out_size)
      : in(static_cast<int32_t>(in_size)),
        out(static_cast<int32_t>(out_size)),
        scale(static_cast<acc_t>(in) / static_cast<acc_t>(out)) {}
  // The first neighbour of a position, and the weight of the second.
  __device__ __forceinline__ int32_t first(int32_t at, acc_t& weight) const {
    return bilinear_first(at, in, scale, weight);
  }
  // The first position whose first neighbour is i or later. The estimate is off by one or so, from rounding.
  __device__ __forceinline__ int32_t reaching(int32_t i) const {
    if (i <= 0) return 0;
    if (i >= in) return out;
    acc_t weight;
    int32_t at = static_cast<int32_t>((static_cast<acc_t>(i) + acc_t(0.5)) / scale);
    at = at < out ? at : out - 1;
    while (at > 0 && first(at - 1, weight) >= i) --at;
    while (at < out && first(at, weight) < i) ++at;
    return at;
  }
};

// What a tile knows of an axis. Position q of a tile is read by pixels [edge[q], edge[q + 2]), by those before
// edge[q + 1] as the second neighbour and by the others as the first: the picture is dealt out among the logits by
// that.
template <typename acc_t>
struct Lines {
  int32_t edge[kSide + 2];
  int32_t begin, end;         // pixels of the piece
  int32_t first[kLines];      // of each of them, from the tile's first position, whose own number is 1
  acc_t weight[kLines];       // of the second neighbour
  acc_t first_share[kLines];  // of the first neighbour, which at the end of the axis is the second one too

  __device__ __forceinline__ void fill(const Axis<acc_t>& axis, int32_t start, int32_t k) {
    acc_t w;
    const int32_t neighbour = axis.first(begin + k, w);
    first[k] = neighbour - start + 1;
    weight[k] = w;
    first_share[k] = neighbour < axis.in - 1 ? 1 - w : (1 - w) + w;
  }
};

template <typename acc_t>
struct Shared {
  Lines<acc_t> rows, columns;
  acc_t logits[kSide + 2][kSide + 2];  // the tile's, and those around it
  acc_t slope[kPixels];                // c (1 - c) of a piece's pixels, 0 where a pixel does not count
};

// A position of weight 0 is not read: an infinite neighbour does not reach a map that is not enlarged.
template <typename acc_t>
__device__ __forceinline__ acc_t blend(acc_t low, acc_t high, acc_t weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// Pixel (y, x) of the piece.
template <typename acc_t>
__device__ __forceinline__ acc_t confidence_at(const Shared<acc_t>& shared, int32_t y, int32_t x) {
  const acc_t(&upper)[kSide + 2] = shared.logits[shared.rows.first[y]];
  const acc_t(&lower)[kSide + 2] = shared.logits[shared.rows.first[y] + 1];
  const int32_t left = shared.columns.first[x];
  const acc_t across = shared.columns.weight[x];
  const acc_t logit = blend(blend(upper[left], upper[left + 1], across), blend(lower[left], lower[left + 1], across),
                            shared.rows.weight[y]);
  return 1 / (1 + std::exp(-logit));
}

// visit(pixel of the piece, its share) for those that read position q of the tile.
template <typename acc_t, typename Visit>
__device__ __forceinline__ void for_each_reader(const Lines<acc_t>& lines, int32_t q, Visit visit) {
  const int32_t own = lines.edge[q + 1];
  for (int32_t k = larger(lines.edge[q], lines.begin); k < smaller(own, lines.end); ++k) {
    visit(k - lines.begin, lines.weight[k - lines.begin]);
  }
  for (int32_t k = larger(own, lines.begin); k < smaller(lines.edge[q + 2], lines.end); ++k) {
    visit(k - lines.begin, lines.first_share[k - lines.begin]);
  }
}

// The piece's pixels: adds those that are the tile's own to the tally, and leaves the slopes.
template <typename acc_t>
__device__ __forceinline__ void visit_pixels(const ArtifactLossParams& p, bool gather, bool counts, acc_t threshold,
                                             const acc_t* maximum, Shared<acc_t>& shared, Tally<acc_t>& tally) {
  const acc_t largest = maximum != nullptr ? *maximum : acc_t(0);
  const int32_t width = shared.columns.end - shared.columns.begin, height = shared.rows.end - shared.rows.begin;
  const int32_t own_y = shared.rows.edge[1] - shared.rows.begin, own_x = shared.columns.edge[1] - shared.columns.begin;
  const int32_t rows_ahead = kThreads / width, columns_ahead = kThreads - rows_ahead * width;
  int32_t y = static_cast<int32_t>(threadIdx.x) / width, x = static_cast<int32_t>(threadIdx.x) - y * width;
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < width * height; k += kThreads) {
    const acc_t c = confidence_at(shared, y, x);
    if (counts && y >= own_y && x >= own_x) tally.add(p.method, c, threshold);
    if (gather) {
      // A NaN is not passed over.
      const bool passed = maximum != nullptr ? c != largest : p.method == kThreshold && c <= threshold;
      shared.slope[k] = passed ? acc_t(0) : c * (1 - c);
    }
    y += rows_ahead;
    x += columns_ahead;
    if (x >= width) x -= width, ++y;
  }
}

// What the piece adds to the gradient of the picture's sum at position (i, j) of the tile.
template <typename acc_t>
__device__ __forceinline__ acc_t gather_slopes(const Shared<acc_t>& shared, int32_t i, int32_t j) {
  const int32_t width = shared.columns.end - shared.columns.begin;
  acc_t sum = 0;
  for_each_reader(shared.rows, i, [&](int32_t y, acc_t down) {
    acc_t line = 0;
    for_each_reader(shared.columns, j, [&](int32_t x, acc_t across) {
      if (across != 0) line += across * shared.slope[y * width + x];
    });
    if (down != 0) sum += down * line;
  });
  return sum;
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
__device__ __forceinline__ void finish(const ArtifactLossParams& p, const Grid& g, int64_t b, void* workspace,
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
__global__ void __launch_bounds__(kThreads, kDtype == kFloat64 ? 1 : 4)
    artifact_loss_kernel(const __grid_constant__ ArtifactLossParams p, const __grid_constant__ Grid g, bool second_pass,
                         void* workspace) {
  using acc_t = std::conditional_t<kDtype == kFloat64, double, float>;
  __shared__ Shared<acc_t> shared;
  const int64_t b = blockIdx.x / static_cast<unsigned>(g.blocks_per_sample);
  const int32_t tile = static_cast<int32_t>(blockIdx.x - b * g.blocks_per_sample);
  const int32_t top = tile / g.tiles_x * kSide, left = tile % g.tiles_x * kSide;
  const bool gather = p.unit_grad != nullptr && (second_pass || p.method != kMethodMax);
  const acc_t threshold = static_cast<acc_t>(p.threshold);
  const acc_t* maximum = second_pass ? static_cast<const acc_t*>(p.maxima) + b : nullptr;
  const Axis<acc_t> vertical(p.in_h, p.out_h), horizontal(p.in_w, p.out_w);

  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (thread < 2 * (kSide + 2)) {
    const int32_t q = thread % (kSide + 2);
    if (thread < kSide + 2) {
      shared.rows.edge[q] = vertical.reaching(smaller(top + q - 1, vertical.in));
    } else {
      shared.columns.edge[q] = horizontal.reaching(smaller(left + q - 1, horizontal.in));
    }
  }
  for (int32_t k = thread; k < (kSide + 2) * (kSide + 2); k += kThreads) {
    const int32_t i = k / (kSide + 2), j = k % (kSide + 2);
    const int64_t y = larger(0, smaller(top + i - 1, vertical.in - 1));
    const int64_t x = larger(0, smaller(left + j - 1, horizontal.in - 1));
    const int64_t at = b * p.batch_stride + y * p.row_stride + x * p.col_stride;
    shared.logits[i][j] = load_element<acc_t>(p.logits, kDtype, at);
  }
  __syncthreads();

  // Without a gradient the tile's own pixels are enough. Pieces are cut evenly.
  const int32_t from_y = shared.rows.edge[gather ? 0 : 1], to_y = shared.rows.edge[kSide + 1];
  const int32_t from_x = shared.columns.edge[gather ? 0 : 1], to_x = shared.columns.edge[kSide + 1];
  const int32_t pieces_x = (to_x - from_x + kLines - 1) / kLines;
  const int32_t width = pieces_x == 0 ? 1 : (to_x - from_x + pieces_x - 1) / pieces_x;
  const int32_t most = smaller(kLines, kPixels / width), pieces_y = (to_y - from_y + most - 1) / most;
  const int32_t height = pieces_y == 0 ? 1 : (to_y - from_y + pieces_y - 1) / pieces_y;
  const int32_t i = thread / kSide, j = thread % kSide;
  Tally<acc_t> tally = Tally<acc_t>::none(p.method);
  acc_t unit_grad = 0;
  for (int32_t y = from_y; y < to_y; y += height) {
    for (int32_t x = from_x; x < to_x; x += width) {
      if (thread == 0) {
        shared.rows.begin = y;
        shared.rows.end = smaller(y + height, to_y);
        shared.columns.begin = x;
        shared.columns.end = smaller(x + width, to_x);
      }
      __syncthreads();
      const int32_t line = thread % kLines;
      if (thread < kLines) {
        if (line < shared.rows.end - shared.rows.begin) shared.rows.fill(vertical, top, line);
      } else if (line < shared.columns.end - shared.columns.begin) {
        shared.columns.fill(horizontal, left, line);
      }
      __syncthreads();
      visit_pixels(p, gather, !second_pass, threshold, maximum, shared, tally);
      __syncthreads();
      if (gather) unit_grad += gather_slopes(shared, i, j);
      __syncthreads();
    }
  }
  if (gather && top + i < vertical.in && left + j < horizontal.in) {
    static_cast<acc_t*>(p.unit_grad)[(b * p.in_h + top + i) * p.in_w + left + j] = unit_grad;
  }
  if (second_pass) return;
  Tally<acc_t>* partials = workspace_body<Tally<acc_t>>(workspace, p.batch);
  merge_block(p.method, tally);
  if (thread == 0) partials[blockIdx.x] = tally;
  finish<acc_t>(p, g, b, workspace, partials);
}

template <int32_t kDtype>
const char* launch_for(const ArtifactLossParams& p, void* workspace, void* stream) {
  for (const int64_t size : {p.in_h, p.in_w, p.out_h, p.out_w})
    if (size > INT32_MAX - 2 * kSide) return "an axis is longer than 2^31 - 33";
  const Grid g = grid_of(p);
  const int64_t blocks = p.batch * g.blocks_per_sample;
  const char* error = launch<artifact_loss_kernel<kDtype>>(blocks, stream, p, g, false, workspace);
  if (error != nullptr || p.unit_grad == nullptr || p.method != kMethodMax) return error;
  return launch<artifact_loss_kernel<kDtype>>(blocks, stream, p, g, true, workspace);
}

}  // namespace

int64_t artifact_loss_workspace(const ArtifactLossParams& p) {
  const int64_t bytes = p.dtype == kFloat64 ? 8 : 4;
  return workspace_bytes(p.batch, 2 * p.batch * grid_of(p).blocks_per_sample, bytes);
}

const char* launch_artifact_loss(const ArtifactLossParams& p, void* workspace, void* stream) {
  return for_dtype(p.dtype, [&](auto dtype) { return launch_for<dtype>(p, workspace, stream); });
}

}  // namespace diffdoctor::cuda
