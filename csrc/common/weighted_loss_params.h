// What weighted_loss and weight_mean are told.
#pragma once

#include <cstdint>

#include "common/losses.h"
#include "common/types.h"

namespace diffdoctor {

// What a launch writes: the loss, the gradient of model_pred, the per-sample sums behind LossStats.
enum Output : int32_t { kWriteLoss = 1, kWriteGrad = 2, kWriteSums = 4 };

constexpr int kMaxTerms = 3;

// Columns of `sums` (batch, 10), in the accumulation type. An element is selected when omega != 0 and v != 0.
enum Sum : int32_t {
  kSumNumerator = 0,       // v * omega * loss over selected elements
  kSumWeight = 1,          // omega over all elements
  kSumArtifactLoss = 2,    // u * loss over selected elements with u != 0
  kSumArtifactWeight = 3,  // u over selected elements
  kSumCleanLoss = 4,       // (1 - u) * loss over selected elements with u != 1
  kSumCleanWeight = 5,     // 1 - u over selected elements
  kSumArtifact = 6,        // u over all elements
  kSumNonfinite = 7,       // selected elements whose v * omega * loss is not finite
  kSumNan = 8,             // elements at which confidence or mask is NaN
  kSumOutside = 9,         // elements at which confidence or mask is below 0 or above 1
  kSums = 10,
};

using Dims = int64_t[kMaxDims];
using DimFlags = int32_t[kMaxDims];
using DimRange = int32_t[2];
using GridSize = int64_t[3];
using GridCoords = Dims[3];
using Terms = Operand[kMaxTerms];
using Strengths = double[kLossKinds];

// What a plan fixes, by the names that Python's Plan and Options have: the fields of the struct, and what bind/ reads.
//   batch            B
//   count            n, elements of a sample: the product of size
//   size             the iteration space of a sample, outermost first, padded with leading ones
//   ndim             how many trailing dims are in use (1..6)
//   dtype            model_pred's and its gradient's, a float; fp64 accumulates in fp64, all others in fp32
//   contiguous       pred, grad and every term are dense within a sample, in the order of `size`
//   weighting        element-wise v; per-sample v is in `weight`
//   coord            grid coordinates of an element, needed by resampled maps only: t = sum_d i_d * coord[0][d],
//                    y: coord[1], x: coord[2]
//   grid             (T, H, W)
//   map_varies       whether confidence or mask changes along a dim
//   free_dims        [begin, end): the longest run of dims along which neither changes; (0, 0) for none
//   free_dims_weighted  the same, `weighting` counted as a map
//   spatial_coefs    a term's coefficient goes from coefs to artifact_coefs as u goes from 0 to 1
//   strength         of each element loss
//   threshold        already rounded to fp32
#define DD_WEIGHTED_LOSS_PLAN(X)  \
  X(int64_t, batch)               \
  X(int64_t, count)               \
  X(Dims, size)                   \
  X(int32_t, ndim)                \
  X(int32_t, dtype)               \
  X(int32_t, contiguous)          \
  X(Operand, pred)                \
  X(Operand, grad)                \
  X(Terms, terms)                 \
  X(Operand, weighting)           \
  X(Map, confidence)              \
  X(Map, mask)                    \
  X(GridCoords, coord)            \
  X(GridSize, grid)               \
  X(DimFlags, map_varies)         \
  X(DimRange, free_dims)          \
  X(DimRange, free_dims_weighted) \
  X(int32_t, spatial_coefs)       \
  X(Strengths, strength)          \
  X(double, artifact_weight)      \
  X(double, clean_weight)         \
  X(double, artifact_grad)        \
  X(double, clean_grad)           \
  X(double, threshold)            \
  X(double, gamma)                \
  X(int32_t, reduction)

// What a call adds to its plan, in the order in which it brings them (backends/native_call.py): addresses ...
#define DD_WEIGHTED_LOSS_POINTERS(X) \
  X(pred.data)                       \
  X(grad.data)                       \
  X(terms[0].data)                   \
  X(terms[1].data)                   \
  X(weighting.data)                  \
  X(confidence.data)                 \
  X(mask.data)                       \
  X(loss)                            \
  X(sums)

// ... and numbers per sample. What few targets have comes behind them or not at all: DD_WEIGHTED_LOSS_MORE_....
#define DD_WEIGHTED_LOSS_NUMBERS(X) \
  X(pred_scale)                     \
  X(coefs[0])                       \
  X(coefs[1])                       \
  X(huber_c)                        \
  X(weight)                         \
  X(z)                              \
  X(grad_output)

#define DD_WEIGHTED_LOSS_MORE_POINTERS(X) X(terms[2].data)
#define DD_WEIGHTED_LOSS_MORE_NUMBERS(X) \
  X(coefs[2])                            \
  X(artifact_coefs[0])                   \
  X(artifact_coefs[1])                   \
  X(artifact_coefs[2])

struct WeightedLossParams {
  DD_WEIGHTED_LOSS_PLAN(DD_FIELD)
  int32_t num_terms;

  PerSample pred_scale;
  PerSample coefs[kMaxTerms];
  PerSample artifact_coefs[kMaxTerms];
  PerSample huber_c;
  PerSample weight;       // per-sample v
  PerSample z;            // the divisor; a sample whose z is 0 contributes 0
  PerSample grad_output;  // g

  int32_t outputs;  // bits of Output
  void* loss;       // kWriteLoss: () for mean and sum, (B) for sample; accumulation type
  void* sums;       // kWriteSums: (B, 10), accumulation type
};

}  // namespace diffdoctor
