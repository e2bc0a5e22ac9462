#define DD_CPU_ISA generic
#include "cpu/kernels.h"
