// The CPU's kernels of artifact_loss.
#pragma once

#include <cstdint>

#include "common/artifact_loss_params.h"
#include "cpu/dispatch.h"

namespace diffdoctor {
namespace cpu {

DD_CPU_KERNEL(artifact_loss, const ArtifactLossParams& p, int threads)

// out[b, i] = unit_grad[b, i] * (factor[b] * g[b * g_stride]) over dense runs of `count`; unit_grad, factor, g:
// accumulation type.
DD_CPU_KERNEL(artifact_loss_backward, const void* unit_grad, const void* factor, const void* g, int64_t g_stride,
              void* out, int32_t dtype, int64_t batch, int64_t count)

}  // namespace cpu
}  // namespace diffdoctor
