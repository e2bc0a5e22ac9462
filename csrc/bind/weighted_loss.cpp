#include "bind/weighted_loss.h"

#include "bind/registry.h"
#include "cpu/weighted_loss.h"

namespace diffdoctor {
namespace {

const Binding weighted_loss([](py::module_& m) {
  py::class_<WeightedLossPlan>(m, "WeightedLossPlan").def(py::init<const py::dict&>());
  py::list kinds;
#define DD_NAME(KIND, NAME) kinds.append(#NAME);
  DD_ELEMENT_LOSSES(DD_NAME)
#undef DD_NAME
  m.attr("loss_kinds") = py::tuple(kinds);
  m.def(
      "weighted_loss_cpu",
      [](const WeightedLossPlan& plan, int outputs, const py::tuple& pointers, const py::tuple& numbers, int threads) {
        const WeightedLossParams p = bind_call(plan, outputs, pointers, numbers);
        py::gil_scoped_release nogil;
        cpu::weighted_loss(p, threads);
      },
      "pointers and numbers as bind_call takes them");
  m.def("weight_mean_cpu", [](const WeightedLossPlan& plan, uintptr_t confidence, uintptr_t mask, uintptr_t out,
                              bool per_sample, int threads) {
    const WeightedLossParams p = bind_maps(plan, confidence, mask);
    py::gil_scoped_release nogil;
    cpu::weight_mean(p, as_pointer(out), per_sample, threads);
  });
});

}  // namespace
}  // namespace diffdoctor
