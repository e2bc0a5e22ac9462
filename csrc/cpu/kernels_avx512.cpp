#if defined(DD_X86_KERNELS)  // built with -mavx512f -mavx512bw -mavx512dq -mavx512vl; see CMakeLists.txt
#define DD_CPU_ISA avx512
#include "cpu/kernels.h"
#endif
