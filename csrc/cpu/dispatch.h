// The builds of a kernel and the choice between them. Each cpu/<op>.cpp is compiled once for every instruction set,
// with DD_CPU_ISA naming the namespace of its entry points (see CMakeLists.txt); all else in it has internal linkage.
#pragma once

#include "common/export.h"

#if !defined(DD_CPU_ISA)
#define DD_CPU_ISA generic
#endif

namespace diffdoctor {
namespace cpu {

enum InstructionSet : int { kGeneric, kAvx2, kAvx512, kInstructionSets };

// The best one that this machine runs; DIFFDOCTOR_CPU_ISA lowers it.
DD_API InstructionSet instruction_set();

// A kernel in every build, called as the one that instruction_set() names.
template <typename signature_t>
struct Kernel;
template <typename... parameters_t>
struct Kernel<void(parameters_t...)> {
  void (*builds[kInstructionSets])(parameters_t...);
  void operator()(parameters_t... arguments) const { builds[instruction_set()](arguments...); }
};

}  // namespace cpu
}  // namespace diffdoctor

// Declares NAME(parameters) in every build, and NAME itself. To be used in namespace diffdoctor::cpu.
#if defined(DD_X86_KERNELS)
#define DD_CPU_KERNEL(NAME, ...) \
  namespace generic {            \
  DD_API void NAME(__VA_ARGS__); \
  }                              \
  namespace avx2 {               \
  DD_API void NAME(__VA_ARGS__); \
  }                              \
  namespace avx512 {             \
  DD_API void NAME(__VA_ARGS__); \
  }                              \
  constexpr Kernel<void(__VA_ARGS__)> NAME = {{generic::NAME, avx2::NAME, avx512::NAME}};
#else
#define DD_CPU_KERNEL(NAME, ...) \
  namespace generic {            \
  DD_API void NAME(__VA_ARGS__); \
  }                              \
  constexpr Kernel<void(__VA_ARGS__)> NAME = {{generic::NAME, nullptr, nullptr}};
#endif
