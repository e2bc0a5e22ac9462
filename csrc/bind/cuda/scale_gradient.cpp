#include "cuda/scale_gradient.h"

#include "bind/cuda/launch.h"
#include "bind/registry.h"

namespace diffdoctor {
namespace {

const Binding scale_gradient([](py::module_& m) {
  m.def("scale_gradient_cuda", [](uintptr_t grad, uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t g,
                                  int64_t g_stride, uintptr_t stream) {
    need(as_pointer(grad), "gradient");
    need(as_pointer(g), "gradient of the loss");
    launch_released("scale_gradient", [&] {
      return cuda::launch_scale_gradient(as_pointer(grad), as_pointer(out), dtype, batch, count, as_pointer(g),
                                         g_stride, as_pointer(stream));
    });
  });
});

}  // namespace
}  // namespace diffdoctor
