#if defined(DD_X86_KERNELS)  // built with -mavx2 -mfma -mf16c; see CMakeLists.txt
#define DD_CPU_ISA avx2
#include "cpu/kernels.h"
#endif
