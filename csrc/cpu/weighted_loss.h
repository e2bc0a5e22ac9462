// The CPU's kernels of weighted_loss. `threads` is torch's own count.
#pragma once

#include "common/weighted_loss_params.h"
#include "cpu/dispatch.h"

namespace diffdoctor {
namespace cpu {

DD_CPU_KERNEL(weighted_loss, const WeightedLossParams& p, int threads)

// out: (B) where per_sample, else (1), accumulation type: the mean of omega over the sample's or the batch's elements.
DD_CPU_KERNEL(weight_mean, const WeightedLossParams& p, void* out, bool per_sample, int threads)

}  // namespace cpu
}  // namespace diffdoctor
