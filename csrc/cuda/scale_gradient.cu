// A kept gradient times what arrives in backward: one number per sample, read on the device. Serves weighted_loss,
// whose kept gradient may be scaled in place, and artifact_loss, which keeps fp32 and has a factor of its own.
#include <cuda_runtime.h>

#include "cuda/artifact_loss.h"
#include "cuda/launch.cuh"
#include "cuda/scale_gradient.h"
#include "cuda/tiling.h"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda {
namespace {

constexpr int kVectorsPerThread = 4;
constexpr int64_t kMostBlocks = 1024;  // one wave of eight an SM; what they have under way fills any GPU's memory

struct Scaling {
  const void* in;
  void* out;
  int64_t count;  // elements of a sample
  int64_t chunks_per_sample, chunks;
  const void* factor;  // (B), or null
  const void* g;
  int64_t g_stride;
};

// A block takes every gridDim.x'th chunk: where nothing is to be done, few blocks come and go.
template <int32_t kInDtype, int32_t kOutDtype, bool kVector>
__global__ void __launch_bounds__(kThreads) scale_gradient_kernel(const __grid_constant__ Scaling s) {
  using acc_t = std::conditional_t<kInDtype == kFloat64, double, float>;
  constexpr int N = kVector ? vector_width(kOutDtype) : 1;
#pragma unroll 1
  for (int64_t chunk = blockIdx.x; chunk < s.chunks; chunk += gridDim.x) {
    const int64_t b = s.chunks == s.chunks_per_sample ? 0 : chunk / s.chunks_per_sample;
    acc_t scale = static_cast<const acc_t*>(s.g)[b * s.g_stride];
    if (s.factor != nullptr) scale *= static_cast<const acc_t*>(s.factor)[b];
    if (s.in == s.out && scale == 1) {
      if (s.g_stride == 0 && s.factor == nullptr) return;
      continue;
    }
    const int64_t first = ((chunk - b * s.chunks_per_sample) * kThreads * kVectorsPerThread + threadIdx.x) * N;
    // `out` may be `in`: another thread may be writing beside what is read here.
    Raw<acc_t, N> raw[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int64_t i = first + static_cast<int64_t>(k) * kThreads * N;
      if (i < s.count) raw[k] = load_raw<acc_t, N, false>(s.in, kInDtype, b * s.count + i);
    }
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int64_t i = first + static_cast<int64_t>(k) * kThreads * N;
      if (i >= s.count) break;
      acc_t value[N];
      Packed<kOutDtype, N> packed;
      unpack<acc_t, N>(raw[k], 0, kInDtype, value);
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] *= scale;
      pack<kOutDtype, acc_t, N>(value, 0, packed);
      store_packed<kOutDtype, N>(s.out, b * s.count + i, packed);
    }
  }
}

template <int32_t kInDtype, int32_t kOutDtype>
const char* launch_for(Scaling s, int64_t batch, void* stream) {
  const int width = vector_width(kOutDtype);
  const bool aligned = reinterpret_cast<uintptr_t>(s.in) % 16 == 0 && reinterpret_cast<uintptr_t>(s.out) % 16 == 0;
  const bool vector = aligned && s.count % width == 0;
  s.chunks_per_sample = ceil_div(s.count, kThreads * kVectorsPerThread * (vector ? width : 1));
  s.chunks = batch * s.chunks_per_sample;
  const int64_t blocks = std::min(s.chunks, kMostBlocks);
  return vector ? launch<scale_gradient_kernel<kInDtype, kOutDtype, true>>(blocks, stream, s)
                : launch<scale_gradient_kernel<kInDtype, kOutDtype, false>>(blocks, stream, s);
}

}  // namespace

const char* launch_scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count,
                                  const void* g, int64_t g_stride, void* stream) {
  const Scaling s{grad, out, count, 0, 0, nullptr, g, g_stride};
  return for_dtype(dtype, [&](auto out_dtype) { return launch_for<out_dtype, out_dtype>(s, batch, stream); });
}

const char* launch_artifact_loss_backward(const void* unit_grad, const void* factor, const void* g, int64_t g_stride,
                                          void* out, int32_t dtype, int64_t batch, int64_t count, void* stream) {
  const Scaling s{unit_grad, out, count, 0, 0, factor, g, g_stride};
  return for_dtype(dtype, [&](auto out_dtype) {
    constexpr int32_t kInDtype = out_dtype == kFloat64 ? kFloat64 : kFloat32;
    return launch_for<kInDtype, out_dtype>(s, batch, stream);
  });
}

}  // namespace diffdoctor::cuda
