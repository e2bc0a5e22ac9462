// The CPU's kernel of policy_loss. `threads` is torch's own count.
#pragma once

#include "common/policy_loss_params.h"
#include "cpu/dispatch.h"

namespace diffdoctor {
namespace cpu {

DD_CPU_KERNEL(policy_loss, const PolicyLossParams& p, int threads)

}  // namespace cpu
}  // namespace diffdoctor
