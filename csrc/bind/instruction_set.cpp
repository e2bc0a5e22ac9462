#include "bind/registry.h"
#include "cpu/dispatch.h"

namespace diffdoctor {
namespace {

const Binding instruction_set([](py::module_& m) {
  m.def(
      "instruction_set",
      [] {
        const char* const names[] = {"generic", "avx2", "avx512"};
        return names[cpu::instruction_set()];
      },
      "which build of the CPU's kernels this machine runs");
});

}  // namespace
}  // namespace diffdoctor
