// Marks what the library of kernels offers to the Python binding, which is built apart from it.
#pragma once

#if !defined(_WIN32)
#define DD_API __attribute__((visibility("default")))
#elif defined(DD_KERNELS_BUILD)
#define DD_API __declspec(dllexport)
#else
#define DD_API  // not dllimport: the addresses of cpu/dispatch.h must be constants
#endif
