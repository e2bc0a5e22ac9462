// From Python's call (diffdoctor/backends/native_call.py) to the parameters of artifact_loss.
#pragma once

#include "bind/arguments.h"
#include "common/artifact_loss_params.h"

namespace diffdoctor {

// arguments: of DD_ARTIFACT_LOSS_PARAMS, in its order.
inline ArtifactLossParams bind_artifact_loss(const py::tuple& arguments) {
  ArtifactLossParams p;
  size_t k = 0;
#define DD_READ(TYPE, NAME) read(arguments[k++], p.NAME);
  DD_ARTIFACT_LOSS_PARAMS(DD_READ)
#undef DD_READ
  if (arguments.size() != k) throw std::invalid_argument("artifact_loss got too many arguments");
  need(p.logits, "logits");
  need(p.loss, "loss");
  return p;
}

}  // namespace diffdoctor
