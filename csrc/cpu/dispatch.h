// The kernels built for each instruction set, and the choice between them.
#pragma once

#include "common/weighted_loss_params.h"

#define DD_DECLARE_KERNELS(ISA)                                                                                 \
  namespace ISA {                                                                                               \
  void weighted_loss(const WeightedLossParams& p, int threads);                                                 \
  void weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads);                       \
  void scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,  \
                      int64_t g_stride, int threads);                                                           \
  void artifact_loss(const ArtifactLossParams& p, int threads);                                                 \
  void artifact_loss_backward(const void* kept, const void* factor, const void* g, int64_t g_stride, void* out, \
                              int32_t dtype, int64_t batch, int64_t count);                                     \
  }

namespace diffdoctor {
namespace cpu {

DD_DECLARE_KERNELS(generic)
#if defined(DD_X86_KERNELS)
DD_DECLARE_KERNELS(avx2)
DD_DECLARE_KERNELS(avx512)
#endif

}  // namespace cpu
}  // namespace diffdoctor
