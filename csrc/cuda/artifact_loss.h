// The launches of artifact_loss; device.h says what holds for each.
#pragma once

#include <cstdint>

#include "common/artifact_loss_params.h"
#include "common/export.h"

namespace diffdoctor::cuda {

DD_API int64_t artifact_loss_workspace(const ArtifactLossParams& p);
DD_API const char* launch_artifact_loss(const ArtifactLossParams& p, void* workspace, void* stream);

// out (B, count) of `dtype`, contiguous = unit_grad * (factor[b] * g[b * g_stride]). In scale_gradient.cu.
DD_API const char* launch_artifact_loss_backward(const void* unit_grad, const void* factor, const void* g,
                                                 int64_t g_stride, void* out, int32_t dtype, int64_t batch,
                                                 int64_t count, void* stream);

}  // namespace diffdoctor::cuda
