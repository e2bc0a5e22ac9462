#include "bind/artifact_loss.h"

#include "bind/registry.h"
#include "cpu/artifact_loss.h"

namespace diffdoctor {
namespace {

const Binding artifact_loss([](py::module_& m) {
  py::list arguments;
#define DD_NAME(TYPE, NAME) arguments.append(#NAME);
  DD_ARTIFACT_LOSS_PARAMS(DD_NAME)
#undef DD_NAME
  m.attr("artifact_loss_arguments") = py::tuple(arguments);
  m.def("artifact_loss_cpu", [](const py::tuple& arguments, int threads) {
    const ArtifactLossParams p = bind_artifact_loss(arguments);
    py::gil_scoped_release nogil;
    cpu::artifact_loss(p, threads);
  });
  m.def("artifact_loss_backward_cpu", [](uintptr_t unit_grad, uintptr_t factor, uintptr_t g, int64_t g_stride,
                                         uintptr_t out, int dtype, int64_t batch, int64_t count) {
    need(as_pointer(unit_grad), "gradient");
    need(as_pointer(g), "gradient of the loss");
    py::gil_scoped_release nogil;
    cpu::artifact_loss_backward(as_pointer(unit_grad), as_pointer(factor), as_pointer(g), g_stride, as_pointer(out),
                                dtype, batch, count);
  });
});

}  // namespace
}  // namespace diffdoctor
