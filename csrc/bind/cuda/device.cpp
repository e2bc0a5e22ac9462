#include "cuda/device.h"

#include "bind/registry.h"

namespace diffdoctor {
namespace {

const Binding device([](py::module_& m) {
  m.attr("has_cuda") = true;
  // None, or why kernels cannot run on the current device: a driver older than this build's runtime, or a GPU for which
  // nothing was compiled.
  m.def("cuda_problem", []() -> py::object {
    const char* problem = cuda::device_problem();
    return problem == nullptr ? py::object(py::none()) : py::object(py::str(problem));
  });
});

}  // namespace
}  // namespace diffdoctor
