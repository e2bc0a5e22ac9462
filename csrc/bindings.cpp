// The Python face of the native kernels: addresses, sizes and strides as integers; nothing of torch. Each file of
// csrc/bind defines its op's functions, and each of csrc/bind/cuda those that a build with CUDA adds.
#include "bind/registry.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of diffdoctor; called through diffdoctor.ops.";
  m.attr("has_cuda") = false;  // bind/cuda/device.cpp knows better
  diffdoctor::define_bindings(m);
}
