// weighted_loss for up to two terms with coefficients that are the same everywhere; the rest is any_terms.cu's.
#include "cuda/weighted_loss.cuh"

namespace diffdoctor::cuda {

const char* device_problem() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, weighted_loss_kernel<Config<kFloat32, true, false>>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int64_t weighted_loss_workspace(const WeightedLossParams& p) {
  if (!(p.outputs & (kWriteLoss | kWriteSums))) return 0;
  const int64_t columns = p.outputs & kWriteSums ? kColumns : 1;
  const int64_t bytes = p.dtype == kFloat64 ? 8 : 4;
  return sizeof(WorkspaceHead) + p.batch * make_tiling(p, true).tiles * columns * bytes;
}

const char* launch_weighted_loss(const WeightedLossParams& p, void* workspace, void* stream) {
  return p.spatial_coefs || p.num_terms > 2 ? launch_any_terms(p, workspace, stream)
                                            : launch_for_dtype<false>(p, workspace, stream);
}

}  // namespace diffdoctor::cuda
