#include "bind/registry.h"
#include "cpu/cache.h"
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
  m.def(
      "set_stream_from",
      [](int64_t bytes) {
        const int64_t before = cpu::stream_from();
        cpu::set_stream_from(bytes);
        return before;
      },
      "bytes that a call moves from which policy_loss stores its gradient past the caches; gives what it was");
});

}  // namespace
}  // namespace diffdoctor
