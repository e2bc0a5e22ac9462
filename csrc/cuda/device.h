// What holds for every launch that csrc/cuda offers to csrc/bind/cuda: it goes to the given stream of the current
// device, allocates nothing, waits for nothing, and returns nullptr or the text of the launch's error.
//
// A workspace is device memory of at least the stated number of bytes, 16-byte aligned. Its first 4096 bytes must be
// zero before its first use; every launch leaves them zero. It must not be shared between streams.
#pragma once

#include "common/export.h"

namespace diffdoctor::cuda {

// nullptr, or why kernels of this build cannot run on the current device. Loads all of them, so that none is loaded
// when first launched: that may be under a capture.
DD_API const char* device_problem();

}  // namespace diffdoctor::cuda
