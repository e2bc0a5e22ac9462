// What artifact_loss is told.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace diffdoctor {

enum ArtifactMethod : int32_t { kThreshold = 0, kMethodMean = 1, kMethodSum = 2, kMethodMax = 3 };

// In the order in which a call brings them (ArtifactArguments in backends/native_call.py):
//   logits                  (B, h, w) and its strides
//   batch, in_h, in_w       of the logits
//   out_h, out_w            of the up-sampled map
//   threshold               already rounded to fp32
//   loss                    () or (B), accumulation type
//   unit_grad               (B, h, w) contiguous, accumulation type: the un-normalised sum's gradient, or null
//   factor                  (B), accumulation type: gradient of the result = g_b * factor[b] * unit_grad[b]
//   maxima                  (B), accumulation type: scratch of one call, kMethodMax with a gradient on a GPU; else null
#define DD_ARTIFACT_LOSS_PARAMS(X) \
  X(const void*, logits)           \
  X(int64_t, batch_stride)         \
  X(int64_t, row_stride)           \
  X(int64_t, col_stride)           \
  X(int64_t, batch)                \
  X(int64_t, in_h)                 \
  X(int64_t, in_w)                 \
  X(int64_t, out_h)                \
  X(int64_t, out_w)                \
  X(double, threshold)             \
  X(int32_t, dtype)                \
  X(int32_t, method)               \
  X(int32_t, reduction)            \
  X(void*, loss)                   \
  X(void*, unit_grad)              \
  X(void*, factor)                 \
  X(void*, maxima)

struct ArtifactLossParams {
  DD_ARTIFACT_LOSS_PARAMS(DD_FIELD)
};

}  // namespace diffdoctor
