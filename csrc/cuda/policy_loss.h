// The launches of policy_loss; see device.h for what holds for all of them.
#pragma once

#include <cstdint>

#include "common/policy_loss_params.h"

namespace diffdoctor::cuda {

int64_t policy_loss_workspace(const PolicyLossParams& p);
const char* launch_policy_loss(const PolicyLossParams& p, void* workspace, void* stream);

}  // namespace diffdoctor::cuda
