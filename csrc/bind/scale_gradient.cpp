#include "cpu/scale_gradient.h"

#include "bind/arguments.h"
#include "bind/registry.h"

namespace diffdoctor {
namespace {

const Binding scale_gradient([](py::module_& m) {
  m.def("scale_gradient_cpu", [](uintptr_t grad, uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t g,
                                 int64_t g_stride, int threads) {
    need(as_pointer(grad), "gradient");
    need(as_pointer(g), "gradient of the loss");
    py::gil_scoped_release nogil;
    cpu::scale_gradient(as_pointer(grad), as_pointer(out), dtype, batch, count, as_pointer(g), g_stride, threads);
  });
});

}  // namespace
}  // namespace diffdoctor
