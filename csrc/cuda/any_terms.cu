// weighted_loss for three terms, and for coefficients that change with the artifact level.
#include "cuda/weighted_loss.cuh"

namespace diffdoctor::cuda {

const char* launch_any_terms(const WeightedLossParams& p, void* workspace, void* stream) {
  return launch_for_dtype<true>(p, workspace, stream);
}

}  // namespace diffdoctor::cuda
