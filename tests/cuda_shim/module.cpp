// The native module's CUDA half for Python, with the kernels of csrc/cuda running on the CPU: their device memory is
// the host's. The last functions are for the tests alone.
#include <pybind11/pybind11.h>

#include <utility>

#include "bind/policy_loss.h"
#include "bind/registry.h"
#include "bind/weighted_loss.h"
#include "common/losses.h"
#include "cpu/vector_math.h"
#include "cuda/l2.h"
#include "cuda/launch.cuh"
#include "cuda/policy_lanes.h"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/tokens.h"
#include "cuda_runtime.h"

namespace py = pybind11;
using namespace diffdoctor;

namespace diffdoctor::cuda {
extern int64_t blocks_for_visits;  // of weight_mean.cu
}

PYBIND11_MODULE(_cuda_shim, m) {
  py::class_<WeightedLossPlan>(m, "WeightedLossPlan", py::module_local()).def(py::init<const py::dict&>());
  define_bindings(m);
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
    d["aligned"] =
        plan.params.contiguous != 0 && cuda::tiles_are_aligned(plan.params, t, cuda::vector_width(plan.params.dtype));
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
  // {kind: ((loss, slope), (loss, slope))} of a residual: by common/losses.h, and as the loops of csrc/cpu take it.
  m.def("element_losses", [](float d, float c) {
    py::dict by_kind;
#define DD_ADD(KIND, NAME)                                                                               \
  {                                                                                                      \
    float loss, slope, loop_loss, loop_slope;                                                            \
    element_loss(LossTag<KIND>(), d, c, loss, slope);                                                    \
    vector_loss(LossTag<KIND>(), d, c, loop_loss, loop_slope);                                           \
    by_kind[#NAME] = py::make_tuple(py::make_tuple(loss, slope), py::make_tuple(loop_loss, loop_slope)); \
  }
    DD_ELEMENT_LOSSES(DD_ADD)
#undef DD_ADD
    return by_kind;
  });
  // Whether the fast kernels serve a plan; how many vectors a thread takes where there are `tiles` for each of them.
  m.def("l2_serves", [](const WeightedLossPlan& plan, int outputs) {
    WeightedLossParams p = plan.params;
    p.outputs = outputs;
    return cuda::l2_serves(p) && !(outputs & kWriteSums);
  });
  // Blocks of a launch where runs start at any element, and where all start at a vector.
  m.def("l2_blocks", [](const WeightedLossPlan& plan) {
    const auto blocks = [&](bool even) { return plan.params.batch * cuda::l2_tiling(plan.params, even).tiles; };
    return py::make_tuple(blocks(false), blocks(true));
  });
  m.def("tokens_serve", [](const WeightedLossPlan& plan) { return cuda::tokens_serve(plan.params); });
  m.def("policy_lanes_serve", [](const WeightedLossPlan& plan, const py::tuple& arguments) {
    return cuda::policy_lanes_serve(bind_policy_loss(plan, arguments));
  });
  m.def("set_tiles_per_vector", [](int64_t tiles) { return std::exchange(cuda::tiles_per_vector, tiles); });
  m.def("set_blocks_for_visits", [](int64_t blocks) { return std::exchange(cuda::blocks_for_visits, blocks); });
  m.def("kernels", [] { return cuda::loaders().size(); });
  m.def("seed", [](uint64_t seed) { cuda_shim::shuffle_state = 2 * seed + 1; });
}
