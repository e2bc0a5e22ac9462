// Plain structs and enums that every native backend receives. No functions, no torch, no CUDA headers: this file is the
// interface between the Python lowering (diffdoctor/lowering/plan.py) and the kernels.
#pragma once

#include <cstdint>

namespace diffdoctor {

// The numeric values are shared with diffdoctor/lowering/plan.py.
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kUInt8 = 4, kBool = 5 };

// How a map reaches the grid. kSame: the map has the grid's size and is read through `stride`, like any operand.
enum MapMode : int32_t { kAbsent = 0, kSame = 1, kArea = 2, kBilinear = 3, kNearest = 4, kNearestExact = 5 };

enum Reduction : int32_t { kMean = 0, kSample = 1, kSum = 2 };

enum LossKind : int32_t { kL2 = 0, kL1 = 1, kHuber = 2, kSmoothL1 = 3, kPseudoHuber = 4, kLogCosh = 5, kLossKinds = 6 };

// What a launch writes: the loss, the gradient of model_pred, the per-sample sums behind LossStats.
enum Work : int32_t { kWriteLoss = 1, kWriteGrad = 2, kWriteSums = 4 };

constexpr int kMaxDims = 6;
constexpr int kMaxTerms = 2;

// Columns of `sums` (batch, 8), in the accumulation type. An element is selected when omega != 0 and v != 0.
enum Sum : int32_t {
  kSumNumerator = 0,       // v * omega * loss over selected elements
  kSumWeight = 1,          // omega over all elements
  kSumArtifactLoss = 2,    // u * loss over selected elements with u != 0
  kSumArtifactWeight = 3,  // u over selected elements
  kSumCleanLoss = 4,       // (1 - u) * loss over selected elements with u != 1
  kSumCleanWeight = 5,     // 1 - u over selected elements
  kSumArtifact = 6,        // u over all elements
  kSumNonfinite = 7,       // selected elements whose v * omega * loss is not finite
  kSums = 8,
};

// A tensor over the iteration space: element (b, i_0 .. i_5) is at b * batch_stride + sum_d i_d * stride[d] elements.
struct Operand {
  void* data;
  int64_t batch_stride;
  int64_t stride[kMaxDims];
  int32_t dtype;
  int32_t present;
};

struct Map {
  const void* data;
  int64_t batch_stride;
  int64_t stride[kMaxDims];  // kSame: over the iteration space
  int64_t in_size[3];        // otherwise: the map's own (T', H', W') and their strides
  int64_t in_stride[3];
  int32_t dtype;
  int32_t mode;
};

// One number per sample in the accumulation type: data[b * stride] where data is set, else value.
struct PerSample {
  const void* data;
  int64_t stride;  // any; 0 where one number serves all
  double value;
};

struct WeightedLossParams {
  int64_t batch;           // B
  int64_t count;           // n, elements of a sample: the product of size
  int64_t size[kMaxDims];  // the iteration space of a sample, outermost first, padded with leading ones
  int32_t ndim;            // how many trailing dims are in use (1..6)
  int32_t pred_dtype;      // kFloat32 | kBFloat16 | kFloat16 | kFloat64; fp64 accumulates in fp64, all others in fp32
  int32_t contiguous;      // pred, grad and every term are dense within a sample, in the order of `size`
  int32_t num_terms;

  Operand pred;
  Operand grad;  // out; dtype of pred
  Operand term[kMaxTerms];
  Operand weighting;  // element-wise v; per-sample v is in `weight`
  Map confidence;
  Map mask;
  // Grid coordinates of an element, needed by resampled maps only: t = sum_d i_d * coord[0][d], y: coord[1], x:
  // coord[2].
  int64_t coord[3][kMaxDims];
  int64_t grid[3];  // (T, H, W)

  PerSample pred_scale;
  PerSample coef[kMaxTerms];
  PerSample huber_c;
  PerSample weight;       // per-sample v
  PerSample z;            // the divisor; a sample whose z is 0 contributes 0
  PerSample grad_output;  // g

  double strength[kLossKinds];
  double artifact_weight, clean_weight;
  double artifact_grad, clean_grad;
  double threshold;  // already rounded to fp32
  double gamma;
  int32_t reduction;
  int32_t work;  // bits of Work

  void* loss;  // kWriteLoss: () for mean and sum, (B) for sample; accumulation type
  void* sums;  // kWriteSums: (B, 8), accumulation type
};

enum ArtifactMethod : int32_t { kThreshold = 0, kMethodMean = 1, kMethodSum = 2, kMethodMax = 3 };

struct ArtifactLossParams {
  const void* logits;  // (B, h, w)
  int64_t batch_stride, row_stride, col_stride;
  int64_t batch, in_h, in_w;  // logits
  int64_t out_h, out_w;       // the up-sampled map
  double threshold;           // already rounded to fp32
  int32_t dtype;
  int32_t method;
  int32_t reduction;
  int32_t write_grad;
  void* loss;    // () or (B), accumulation type
  void* kept;    // (B, h, w) contiguous, accumulation type: gradient of the un-normalised sum
  void* factor;  // (B), accumulation type: gradient of the result = g_b * factor[b] * kept[b]
};

}  // namespace diffdoctor
