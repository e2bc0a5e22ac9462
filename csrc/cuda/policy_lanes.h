// policy_loss for nearly every training call: fp32 arithmetic, model_pred and what the step drew dense, as latents
// (C, H W) or as packed tokens (H W, C 2 2). Four lanes share 16 bytes of pixels and take every fourth of their
// channels' vectors, which they keep in registers between the sums over channels and the gradient.
#pragma once

#include <cstdint>

#include "common/policy_loss_params.h"

namespace diffdoctor::cuda {

constexpr int kGroupsPerBlock = 64;  // of four lanes

// Whether launch_policy_lanes serves the call.
bool policy_lanes_serve(const PolicyLossParams& p);

const char* launch_policy_lanes(const PolicyLossParams& p, void* workspace, void* stream);

}  // namespace diffdoctor::cuda
