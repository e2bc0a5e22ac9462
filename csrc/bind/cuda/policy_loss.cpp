#include "cuda/policy_loss.h"

#include "bind/cuda/launch.h"
#include "bind/policy_loss.h"
#include "bind/registry.h"

namespace diffdoctor {
namespace {

const Binding policy_loss([](py::module_& m) {
  m.def("policy_loss_cuda_workspace", [](const WeightedLossPlan& plan, const py::tuple& arguments) {
    return cuda::policy_loss_workspace(bind_policy_loss(plan, arguments));
  });
  m.def("policy_loss_cuda",
        [](const WeightedLossPlan& plan, const py::tuple& arguments, uintptr_t workspace, uintptr_t stream) {
          const PolicyLossParams p = bind_policy_loss(plan, arguments);
          launch_released("policy_loss",
                          [&] { return cuda::launch_policy_loss(p, as_pointer(workspace), as_pointer(stream)); });
        });
});

}  // namespace
}  // namespace diffdoctor
