#include "bind/policy_loss.h"

#include "bind/registry.h"
#include "cpu/policy_loss.h"

namespace diffdoctor {
namespace {

const Binding policy_loss([](py::module_& m) {
  py::list arguments;
#define DD_NAME(TYPE, NAME) arguments.append(#NAME);
  DD_POLICY_LOSS_PARAMS(DD_NAME)
#undef DD_NAME
  m.attr("policy_loss_arguments") = py::tuple(arguments);
  m.def("policy_loss_cpu", [](const WeightedLossPlan& plan, const py::tuple& arguments, int threads) {
    const PolicyLossParams p = bind_policy_loss(plan, arguments);
    py::gil_scoped_release nogil;
    cpu::policy_loss(p, threads);
  });
});

}  // namespace
}  // namespace diffdoctor
