// The Python face of the native kernels: addresses, sizes and strides as integers; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/weighted_loss.h"
#include "common/weighted_loss_params.h"
#include "cpu/cpu.h"

#if defined(DIFFDOCTOR_CUDA)
#include "bindings_cuda.h"
#endif

namespace py = pybind11;
using namespace diffdoctor;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of diffdoctor; called through diffdoctor.ops.";
  py::class_<WeightedLossPlan>(m, "WeightedLossPlan").def(py::init<const py::dict&>());
  m.def("instruction_set", &cpu::instruction_set);

  m.def(
      "weighted_loss_cpu",
      [](const WeightedLossPlan& plan, int work, const py::tuple& pointers, const py::tuple& per_sample, int threads) {
        const WeightedLossParams p = bind_call(plan, work, pointers, per_sample);
        py::gil_scoped_release nogil;
        cpu::weighted_loss(p, threads);
      },
      "pointers and per_sample as bind_call takes them");
  m.def("weight_mean_cpu", [](const WeightedLossPlan& plan, uintptr_t confidence, uintptr_t mask, uintptr_t out,
                              bool per_sample, int threads) {
    WeightedLossParams p = plan.params;
    p.confidence.data = reinterpret_cast<const void*>(confidence);
    p.mask.data = reinterpret_cast<const void*>(mask);
    py::gil_scoped_release nogil;
    cpu::weight_mean(p, reinterpret_cast<void*>(out), per_sample, threads);
  });
  m.def("scale_gradient_cpu", [](uintptr_t grad, uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t g,
                                 int64_t g_stride, int threads) {
    py::gil_scoped_release nogil;
    cpu::scale_gradient(reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(out), dtype, batch, count,
                        reinterpret_cast<const void*>(g), g_stride, threads);
  });
  m.def("artifact_loss_cpu", [](const py::tuple& description, int threads) {
    const ArtifactLossParams p = bind_artifact_loss(description);
    py::gil_scoped_release nogil;
    cpu::artifact_loss(p, threads);
  });
  m.def("artifact_loss_backward_cpu", [](uintptr_t kept, uintptr_t factor, uintptr_t g, int64_t g_stride, uintptr_t out,
                                         int dtype, int64_t batch, int64_t count) {
    py::gil_scoped_release nogil;
    cpu::artifact_loss_backward(reinterpret_cast<const void*>(kept), reinterpret_cast<const void*>(factor),
                                reinterpret_cast<const void*>(g), g_stride, reinterpret_cast<void*>(out), dtype, batch,
                                count);
  });

#if defined(DIFFDOCTOR_CUDA)
  define_cuda(m);
#endif
  m.attr("has_cuda") =
#if defined(DIFFDOCTOR_CUDA)
      true;
#else
      false;
#endif
}
