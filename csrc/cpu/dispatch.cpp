#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace diffdoctor {
namespace cpu {
namespace {

InstructionSet detect() {
#if defined(DD_X86_KERNELS)
  InstructionSet best = kGeneric;
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

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = detect();
  return set;
}

}  // namespace cpu
}  // namespace diffdoctor
