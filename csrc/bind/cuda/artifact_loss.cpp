#include "cuda/artifact_loss.h"

#include "bind/artifact_loss.h"
#include "bind/cuda/launch.h"
#include "bind/registry.h"

namespace diffdoctor {
namespace {

const Binding artifact_loss([](py::module_& m) {
  m.def("artifact_loss_cuda_workspace",
        [](const py::tuple& arguments) { return cuda::artifact_loss_workspace(bind_artifact_loss(arguments)); });
  m.def("artifact_loss_cuda", [](const py::tuple& arguments, uintptr_t workspace, uintptr_t stream) {
    const ArtifactLossParams p = bind_artifact_loss(arguments);
    launch_released("artifact_loss",
                    [&] { return cuda::launch_artifact_loss(p, as_pointer(workspace), as_pointer(stream)); });
  });
  m.def("artifact_loss_backward_cuda", [](uintptr_t unit_grad, uintptr_t factor, uintptr_t g, int64_t g_stride,
                                          uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t stream) {
    need(as_pointer(unit_grad), "gradient");
    need(as_pointer(g), "gradient of the loss");
    launch_released("artifact_loss_backward", [&] {
      return cuda::launch_artifact_loss_backward(as_pointer(unit_grad), as_pointer(factor), as_pointer(g), g_stride,
                                                 as_pointer(out), dtype, batch, count, as_pointer(stream));
    });
  });
});

}  // namespace
}  // namespace diffdoctor
