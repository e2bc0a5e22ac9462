// Marks for functions shared by host and device. All are static: files built for different instruction sets must never
// share a symbol, or the linker may keep the copy that a machine cannot run.
#pragma once

#if defined(__CUDACC__)
#define DD_HD static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DD_HD static inline __attribute__((always_inline, unused))
#else
#define DD_HD static inline
#endif
