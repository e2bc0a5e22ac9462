// Defines the entry points of one instruction set, DD_CPU_ISA; see dispatch.h.
#pragma once

#include "cpu/artifact_loss_impl.h"
#include "cpu/dispatch.h"
#include "cpu/scale_impl.h"
#include "cpu/weighted_loss_impl.h"

namespace diffdoctor {
namespace cpu {
namespace DD_CPU_ISA {

void weighted_loss(const WeightedLossParams& p, int threads) {
  if (p.pred_dtype == kFloat64)
    run_weighted_loss<double>(p, threads);
  else
    run_weighted_loss<float>(p, threads);
}

void weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads) {
  if (p.pred_dtype == kFloat64)
    run_weight_mean<double>(p, out, per_sample, threads);
  else
    run_weight_mean<float>(p, out, per_sample, threads);
}

void scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
                    int64_t g_stride, int threads) {
  if (dtype == kFloat64)
    run_scale_gradient<double>(grad, out, dtype, batch, count, g, g_stride, threads);
  else
    run_scale_gradient<float>(grad, out, dtype, batch, count, g, g_stride, threads);
}

void artifact_loss(const ArtifactLossParams& p, int threads) {
  if (p.dtype == kFloat64)
    run_artifact_loss<double>(p, threads);
  else
    run_artifact_loss<float>(p, threads);
}

void artifact_loss_backward(const void* kept, const void* factor, const void* g, int64_t g_stride, void* out,
                            int32_t dtype, int64_t batch, int64_t count) {
  if (dtype == kFloat64)
    run_artifact_loss_backward<double>(kept, factor, g, g_stride, out, dtype, batch, count);
  else
    run_artifact_loss_backward<float>(kept, factor, g, g_stride, out, dtype, batch, count);
}

}  // namespace DD_CPU_ISA
}  // namespace cpu
}  // namespace diffdoctor
