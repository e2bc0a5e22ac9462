#include "cuda/weighted_loss.h"

#include "bind/cuda/launch.h"
#include "bind/registry.h"
#include "bind/weighted_loss.h"

namespace diffdoctor {
namespace {

const Binding weighted_loss([](py::module_& m) {
  m.def("weighted_loss_cuda_workspace", [](const WeightedLossPlan& plan, int outputs) {
    WeightedLossParams p = plan.params;
    p.outputs = outputs;
    return cuda::weighted_loss_workspace(p);
  });
  m.def("weighted_loss_cuda", [](const WeightedLossPlan& plan, int outputs, const py::tuple& pointers,
                                 const py::tuple& numbers, uintptr_t workspace, uintptr_t stream) {
    const WeightedLossParams p = bind_call(plan, outputs, pointers, numbers);
    launch_released("weighted_loss",
                    [&] { return cuda::launch_weighted_loss(p, as_pointer(workspace), as_pointer(stream)); });
  });
  m.def("weight_mean_cuda_workspace",
        [](const WeightedLossPlan& plan) { return cuda::weight_mean_workspace(plan.params); });
  m.def("weight_mean_cuda", [](const WeightedLossPlan& plan, uintptr_t confidence, uintptr_t mask, uintptr_t out,
                               bool per_sample, uintptr_t workspace, uintptr_t stream) {
    const WeightedLossParams p = bind_maps(plan, confidence, mask);
    launch_released("weight_mean", [&] {
      return cuda::launch_weight_mean(p, as_pointer(out), per_sample, as_pointer(workspace), as_pointer(stream));
    });
  });
});

}  // namespace
}  // namespace diffdoctor
