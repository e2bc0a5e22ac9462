// What the CPU backend offers to bindings.cpp. Nothing here knows torch; `threads` is torch's own count.
#pragma once

#include <cstdint>

#include "common/weighted_loss_params.h"

namespace diffdoctor {
namespace cpu {

void weighted_loss(const WeightedLossParams& p, int threads);

// out: (B) where per_sample, else (1), accumulation type: the mean of omega over the sample's or the batch's elements.
void weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads);

// out = grad * g_b over `batch` dense runs of `count` elements; where out is grad, a run whose g is 1 is not touched.
void scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
                    int64_t g_stride, int threads);

void artifact_loss(const ArtifactLossParams& p, int threads);

// out[b, i] = kept[b, i] * (factor[b] * g[b * g_stride]) over dense runs of `count`; kept, factor, g: accumulation
// type.
void artifact_loss_backward(const void* kept, const void* factor, const void* g, int64_t g_stride, void* out,
                            int32_t dtype, int64_t batch, int64_t count);

// "avx512", "avx2" or "generic": which build of the kernels this machine runs. DIFFDOCTOR_CPU_ISA lowers it.
const char* instruction_set();

}  // namespace cpu
}  // namespace diffdoctor
