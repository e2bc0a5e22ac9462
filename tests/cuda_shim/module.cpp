// The native module's CUDA half for Python, with the kernels of csrc/cuda running on the CPU: their device memory is
// the host's. The last functions are for the tests alone.
#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "cuda_runtime.h"

namespace py = pybind11;
using namespace diffdoctor;

PYBIND11_MODULE(_cuda_shim, m) {
  py::class_<WeightedLossPlan>(m, "WeightedLossPlan", py::module_local()).def(py::init<const py::dict&>());
  define_cuda(m);
  m.attr("has_cuda") = true;
  m.def("launches", [] { return cuda_shim::record.launches; });
  m.def("blocks", [] { return cuda_shim::record.blocks; });
  m.def("stream", [] { return reinterpret_cast<uintptr_t>(cuda_shim::record.stream); });
  m.def("fail_next", [](int error) { cuda_shim::record.fail_next = error; });
  m.def("seed", [](uint64_t seed) { cuda_shim::shuffle_state = 2 * seed + 1; });
}
