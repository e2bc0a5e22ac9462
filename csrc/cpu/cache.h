// The size of the processor's caches.
#pragma once

#include <cstdint>

#include "common/export.h"

namespace diffdoctor {
namespace cpu {

// Bytes that a call moves from which its gradient is stored past the caches: what the last cache holds, 32 MiB where
// that is unknown.
DD_API int64_t stream_from();

// Another number from now on, for tests.
DD_API void set_stream_from(int64_t bytes);

}  // namespace cpu
}  // namespace diffdoctor
