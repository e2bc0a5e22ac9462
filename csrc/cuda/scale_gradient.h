// The launch of weighted_loss's backward; device.h says what holds for it.
#pragma once

#include <cstdint>

#include "common/export.h"

namespace diffdoctor::cuda {

// out = grad * g_b over `batch` dense runs of `count` elements. out may be grad: then a run whose g is 1 is not
// touched.
DD_API const char* launch_scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count,
                                         const void* g, int64_t g_stride, void* stream);

}  // namespace diffdoctor::cuda
