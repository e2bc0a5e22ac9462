// The CUDA half of bindings.cpp: the same arguments as the CPU functions, and a workspace and a stream as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/weighted_loss.h"
#include "cuda/launches.h"

namespace diffdoctor {

inline void raise_launch_error(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("diffdoctor: CUDA could not launch ") + op + ": " + error);
}

template <typename Launch>
void launch_released(const char* op, Launch launch) {
  const char* error;
  {
    py::gil_scoped_release nogil;
    error = launch();
  }
  raise_launch_error(op, error);
}

inline void* as_pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline void define_cuda_weighted_loss(py::module_& m) {
  m.def("weighted_loss_cuda_workspace", [](const WeightedLossPlan& plan, int work) {
    WeightedLossParams p = plan.params;
    p.work = work;
    return cuda::weighted_loss_workspace(p);
  });
  m.def("weighted_loss_cuda", [](const WeightedLossPlan& plan, int work, const py::tuple& pointers,
                                 const py::tuple& per_sample, uintptr_t workspace, uintptr_t stream) {
    const WeightedLossParams p = bind_call(plan, work, pointers, per_sample);
    launch_released("weighted_loss",
                    [&] { return cuda::launch_weighted_loss(p, as_pointer(workspace), as_pointer(stream)); });
  });
  m.def("weight_mean_cuda_workspace",
        [](const WeightedLossPlan& plan) { return cuda::weight_mean_workspace(plan.params); });
  m.def("weight_mean_cuda", [](const WeightedLossPlan& plan, uintptr_t confidence, uintptr_t mask, uintptr_t out,
                               bool per_sample, uintptr_t workspace, uintptr_t stream) {
    WeightedLossParams p = plan.params;
    p.confidence.data = as_pointer(confidence);
    p.mask.data = as_pointer(mask);
    launch_released("weight_mean", [&] {
      return cuda::launch_weight_mean(p, as_pointer(out), per_sample, as_pointer(workspace), as_pointer(stream));
    });
  });
  m.def("scale_gradient_cuda", [](uintptr_t grad, uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t g,
                                  int64_t g_stride, uintptr_t stream) {
    launch_released("scale_gradient", [&] {
      return cuda::launch_scale_gradient(as_pointer(grad), as_pointer(out), dtype, batch, count, as_pointer(g),
                                         g_stride, as_pointer(stream));
    });
  });
}

inline void define_cuda_artifact_loss(py::module_& m) {
  m.def("artifact_loss_cuda_workspace",
        [](const py::tuple& description) { return cuda::artifact_loss_workspace(bind_artifact_loss(description)); });
  m.def("artifact_loss_cuda", [](const py::tuple& description, uintptr_t workspace, uintptr_t stream) {
    const ArtifactLossParams p = bind_artifact_loss(description);
    launch_released("artifact_loss",
                    [&] { return cuda::launch_artifact_loss(p, as_pointer(workspace), as_pointer(stream)); });
  });
  m.def("artifact_loss_backward_cuda", [](uintptr_t kept, uintptr_t factor, uintptr_t g, int64_t g_stride,
                                          uintptr_t out, int dtype, int64_t batch, int64_t count, uintptr_t stream) {
    launch_released("artifact_loss_backward", [&] {
      return cuda::launch_artifact_loss_backward(as_pointer(kept), as_pointer(factor), as_pointer(g), g_stride,
                                                 as_pointer(out), dtype, batch, count, as_pointer(stream));
    });
  });
}

inline void define_cuda(py::module_& m) {
  // None, or why kernels cannot run on the current device: a driver older than this build's runtime, or a GPU for which
  // nothing was compiled.
  m.def("cuda_problem", []() -> py::object {
    const char* problem = cuda::device_problem();
    return problem == nullptr ? py::object(py::none()) : py::object(py::str(problem));
  });
  define_cuda_weighted_loss(m);
  define_cuda_artifact_loss(m);
}

}  // namespace diffdoctor
