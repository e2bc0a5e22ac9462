// The native module's CUDA half for Python, with the kernels of csrc/cuda running on the CPU: their device memory is
// the host's. The last functions are for the tests alone.
#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda_runtime.h"

namespace py = pybind11;
using namespace diffdoctor;

PYBIND11_MODULE(_cuda_shim, m) {
  py::class_<WeightedLossPlan>(m, "WeightedLossPlan", py::module_local()).def(py::init<const py::dict&>());
  define_cuda(m);
  m.attr("has_cuda") = true;
  m.def("launches", [] { return cuda_shim::record.launches; });
  m.def("blocks", [] { return cuda_shim::record.blocks; });
  m.def("stream", [] { return reinterpret_cast<uintptr_t>(cuda_shim::record.stream); });
  m.def("fail_next", [](int error) { cuda_shim::record.fail_next = error; });
  // How a plan's samples are cut, and whether 16-byte accesses are open to it.
  m.def("tiling", [](const WeightedLossPlan& plan) {
    const cuda::Tiling t = cuda::make_tiling(plan.params, true);
    py::dict d;
    d["outer"] = t.outer;
    d["free"] = t.free;
    d["inner"] = t.inner;
    d["tiles"] = t.tiles;
    d["positions"] = t.positions;
    d["groups"] = t.groups;
    d["narrow"] = t.narrow != 0;
    d["aligned"] = plan.params.contiguous != 0 &&
                   cuda::tiles_are_aligned(plan.params, t, cuda::vector_width(plan.params.pred_dtype));
    return d;
  });
  // (element of its first position at f = 0, of its last one at its last f, elements) of a tile.
  m.def("tile", [](const WeightedLossPlan& plan, int64_t index) {
    const cuda::Tiling t = cuda::make_tiling(plan.params, true);
    const cuda::Tile tile(t, index);
    const int64_t frees = tile.free_end - tile.free_begin;
    return py::make_tuple(tile.element(t, 0) + tile.free_begin * t.inner,
                          tile.element(t, tile.positions - 1) + (tile.free_end - 1) * t.inner, tile.positions * frees);
  });
  m.def("seed", [](uint64_t seed) { cuda_shim::shuffle_state = 2 * seed + 1; });
}
