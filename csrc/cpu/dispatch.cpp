#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"

namespace diffdoctor {
namespace cpu {
namespace {

enum Isa { kGeneric, kAvx2, kAvx512 };

Isa detect() {
#if defined(DD_X86_KERNELS)
  Isa best = kGeneric;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = kAvx512;
  const char* wanted = std::getenv("DIFFDOCTOR_CPU_ISA");
  if (wanted && !std::strcmp(wanted, "generic")) return kGeneric;
  if (wanted && !std::strcmp(wanted, "avx2") && best >= kAvx2) return kAvx2;
  return best;
#else
  return kGeneric;
#endif
}

Isa chosen() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace

#if defined(DD_X86_KERNELS)
#define DD_CALL(FUNCTION, ...)               \
  switch (chosen()) {                        \
    case kAvx512:                            \
      return avx512::FUNCTION(__VA_ARGS__);  \
    case kAvx2:                              \
      return avx2::FUNCTION(__VA_ARGS__);    \
    default:                                 \
      return generic::FUNCTION(__VA_ARGS__); \
  }
#else
#define DD_CALL(FUNCTION, ...) return generic::FUNCTION(__VA_ARGS__)
#endif

void weighted_loss(const WeightedLossParams& p, int threads) { DD_CALL(weighted_loss, p, threads); }

void weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads) {
  DD_CALL(weight_mean, p, out, per_sample, threads);
}

void scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
                    int64_t g_stride, int threads) {
  DD_CALL(scale_gradient, grad, out, dtype, batch, count, g, g_stride, threads);
}

void artifact_loss(const ArtifactLossParams& p, int threads) { DD_CALL(artifact_loss, p, threads); }

void artifact_loss_backward(const void* kept, const void* factor, const void* g, int64_t g_stride, void* out,
                            int32_t dtype, int64_t batch, int64_t count) {
  DD_CALL(artifact_loss_backward, kept, factor, g, g_stride, out, dtype, batch, count);
}

const char* instruction_set() {
  const char* names[] = {"generic", "avx2", "avx512"};
  return names[chosen()];
}

}  // namespace cpu
}  // namespace diffdoctor
