// The launches of weighted_loss; device.h says what holds for each.
#pragma once

#include <cstdint>

#include "common/export.h"
#include "common/weighted_loss_params.h"

namespace diffdoctor::cuda {

DD_API int64_t weighted_loss_workspace(const WeightedLossParams& p);
DD_API const char* launch_weighted_loss(const WeightedLossParams& p, void* workspace, void* stream);

// out: (B) or (1) of the accumulation type: mean of omega over the sample's or the batch's elements.
DD_API int64_t weight_mean_workspace(const WeightedLossParams& p);
DD_API const char* launch_weight_mean(const WeightedLossParams& p, void* out, bool per_sample, void* workspace,
                                      void* stream);

}  // namespace diffdoctor::cuda
