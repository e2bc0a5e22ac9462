// From Python's plan and call (diffdoctor/backends/native_call.py) to the parameters of weighted_loss: the static half
// once per plan, addresses and per-sample numbers per call.
#pragma once

#include "bind/arguments.h"
#include "common/weighted_loss_params.h"

namespace diffdoctor {

struct WeightedLossPlan {
  WeightedLossParams params;

  // fields: those of DD_WEIGHTED_LOSS_PLAN by name.
  explicit WeightedLossPlan(const py::dict& fields) {
#define DD_COUNT(TYPE, NAME) +1
    if (fields.size() != 0 DD_WEIGHTED_LOSS_PLAN(DD_COUNT))
      throw std::invalid_argument("a plan has too few or too many fields");
#undef DD_COUNT
    std::memset(&params, 0, sizeof(params));
#define DD_READ(TYPE, NAME) read(fields[#NAME], params.NAME);
    DD_WEIGHTED_LOSS_PLAN(DD_READ)
#undef DD_READ
    for (const Operand& term : params.terms) params.num_terms += term.present;
  }
};

inline void need_maps(const WeightedLossParams& p) {
  if (p.confidence.mode != kAbsent) need(p.confidence.data, "confidence");
  if (p.mask.mode != kAbsent) need(p.mask.data, "mask");
}

// pointers: of DD_WEIGHTED_LOSS_POINTERS, 0 where absent. numbers: of DD_WEIGHTED_LOSS_NUMBERS. Behind both, those of
// DD_WEIGHTED_LOSS_MORE_..., or nothing.
inline WeightedLossParams bind_call(const WeightedLossPlan& plan, int outputs, const py::tuple& pointers,
                                    const py::tuple& numbers) {
#define DD_COUNT(FIELD) +1
  constexpr size_t kPointers = 0 DD_WEIGHTED_LOSS_POINTERS(DD_COUNT), kNumbers = 0 DD_WEIGHTED_LOSS_NUMBERS(DD_COUNT);
  constexpr size_t kMorePointers = 0 DD_WEIGHTED_LOSS_MORE_POINTERS(DD_COUNT);
  constexpr size_t kMoreNumbers = 0 DD_WEIGHTED_LOSS_MORE_NUMBERS(DD_COUNT);
#undef DD_COUNT
  const bool more = numbers.size() != kNumbers;
  if (more && numbers.size() != kNumbers + kMoreNumbers) throw std::invalid_argument("numbers are missing");
  if (pointers.size() != kPointers + (more ? kMorePointers : 0)) throw std::invalid_argument("pointers are missing");
  WeightedLossParams p = plan.params;
  p.outputs = outputs;
  size_t k = 0;
#define DD_READ(FIELD) p.FIELD = pointer_at(pointers, k++);
  DD_WEIGHTED_LOSS_POINTERS(DD_READ)
  if (more) {
    DD_WEIGHTED_LOSS_MORE_POINTERS(DD_READ)
  }
#undef DD_READ
  k = 0;
#define DD_READ(FIELD) p.FIELD = per_sample_at(numbers, k++);
  DD_WEIGHTED_LOSS_NUMBERS(DD_READ)
  if (more) {
    DD_WEIGHTED_LOSS_MORE_NUMBERS(DD_READ)
  }
#undef DD_READ
  if (PyErr_Occurred()) throw py::error_already_set();
  need(p.pred.data, "model_pred");
  for (int term = 0; term < p.num_terms; ++term) need(p.terms[term].data, "target");
  if (p.weighting.present) need(p.weighting.data, "weighting");
  need_maps(p);
  if (outputs & kWriteLoss) need(p.loss, "loss");
  if (outputs & kWriteGrad) need(p.grad.data, "gradient");
  if (outputs & kWriteSums) need(p.sums, "sums");
  return p;
}

// The same for weight_mean, which reads the maps alone.
inline WeightedLossParams bind_maps(const WeightedLossPlan& plan, uintptr_t confidence, uintptr_t mask) {
  WeightedLossParams p = plan.params;
  p.confidence.data = as_pointer(confidence);
  p.mask.data = as_pointer(mask);
  need_maps(p);
  return p;
}

}  // namespace diffdoctor
