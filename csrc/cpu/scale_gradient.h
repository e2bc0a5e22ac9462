// The CPU's kernel of weighted_loss's backward.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace diffdoctor {
namespace cpu {

// out = grad * g_b over `batch` dense runs of `count` elements; where out is grad, a run whose g is 1 is not touched.
DD_CPU_KERNEL(scale_gradient, const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
              int64_t g_stride, int threads)

}  // namespace cpu
}  // namespace diffdoctor
