// From Python's call (diffdoctor/backends/native_call.py) to the parameters of policy_loss: the plan of weighted_loss,
// made once, and what a call adds to it.
#pragma once

#include "bind/weighted_loss.h"
#include "common/policy_loss_params.h"

namespace diffdoctor {

// None: absent. A float: that number. (address, stride): one number per sample.
inline void read(const py::handle& value, PerSample& out) { out = per_sample_at(py::make_tuple(value), 0); }

// arguments: of DD_POLICY_LOSS_PARAMS, in its order.
inline PolicyLossParams bind_policy_loss(const WeightedLossPlan& plan, const py::tuple& arguments) {
  PolicyLossParams p;
  p.grid = plan.params;
  size_t k = 0;
#define DD_READ(TYPE, NAME) read(arguments[k++], p.NAME);
  DD_POLICY_LOSS_PARAMS(DD_READ)
#undef DD_READ
  if (arguments.size() != k) throw std::invalid_argument("policy_loss got too many arguments");
  p.grid.pred.data = const_cast<void*>(p.pred);
  p.grid.grad.data = p.grad;
  p.grid.terms[0].data = const_cast<void*>(p.latents);
  p.grid.terms[1].data = const_cast<void*>(p.next_latents);
  p.grid.terms[2].data = const_cast<void*>(p.ref_pred);
  p.grid.weighting.data = p.log_prob;
  p.grid.confidence.data = p.advantage;
  p.grid.mask.data = p.mask;
  need(p.pred, "model_pred");
  need(p.latents, "latents");
  need(p.next_latents, "next_latents");
  if (p.has_ref()) need(p.ref_pred, "ref_pred");
  if (p.old == kOldPerPixel || (p.outputs & kWriteLogProb)) need(p.log_prob, "old_log_prob");
  if (p.grid.confidence.mode != kAbsent) need(p.advantage, "advantage");
  if (p.grid.mask.mode != kAbsent) need(p.mask, "mask");
  if (p.outputs & kWriteLoss) need(p.loss, "loss");
  if (p.outputs & kWriteGrad) need(p.grad, "gradient");
  if (p.outputs & kWriteSums) need(p.sums, "sums");
  return p;
}

}  // namespace diffdoctor
