// What the CUDA backend offers to bindings.cpp. Every launch goes to the given stream of the current device, allocates
// nothing, waits for nothing, and returns nullptr or the text of the launch's error.
//
// A workspace is device memory of at least the stated number of bytes, 16-byte aligned. Its first 16 bytes must be zero
// before its first use; every launch leaves them zero. It must not be shared between streams.
#pragma once

#include <cstdint>

#include "common/weighted_loss_params.h"

namespace diffdoctor::cuda {

// nullptr, or why kernels of this build cannot run on the current device.
const char* device_problem();

int64_t weighted_loss_workspace(const WeightedLossParams& p);
const char* launch_weighted_loss(const WeightedLossParams& p, void* workspace, void* stream);

// out: (B) or (1) of the accumulation type: mean of omega over the sample's or the batch's elements.
int64_t weight_mean_workspace(const WeightedLossParams& p);
const char* launch_weight_mean(const WeightedLossParams& p, void* out, bool per_sample, void* workspace, void* stream);

// out = grad * g_b over `batch` dense runs of `count` elements. out may be grad: then a run whose g is 1 is not
// touched.
const char* launch_scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count,
                                  const void* g, int64_t g_stride, void* stream);

int64_t artifact_loss_workspace(const ArtifactLossParams& p);
const char* launch_artifact_loss(const ArtifactLossParams& p, void* workspace, void* stream);

// out (B, count) of `dtype`, contiguous = kept * (factor[b] * g[b * g_stride]).
const char* launch_artifact_loss_backward(const void* kept, const void* factor, const void* g, int64_t g_stride,
                                          void* out, int32_t dtype, int64_t batch, int64_t count, void* stream);

}  // namespace diffdoctor::cuda
