// The launches of policy_loss; see device.h for what holds for all of them.
#pragma once

#include <cstdint>

#include "common/export.h"
#include "common/policy_loss_params.h"

namespace diffdoctor::cuda {

DD_API int64_t policy_loss_workspace(const PolicyLossParams& p);
DD_API const char* launch_policy_loss(const PolicyLossParams& p, void* workspace, void* stream);

}  // namespace diffdoctor::cuda
