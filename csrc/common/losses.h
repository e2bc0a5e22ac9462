// Element losses and their derivatives, in float or double: the one list of them for the CPU and for CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/platform.h"

namespace diffdoctor {

// X(kind, name), in the order of ELEMENT_LOSSES in diffdoctor/reference/losses.py. NAME_loss(d, c, loss, slope) stands
// below; d is prediction minus target, c the Huber threshold. Where its code does not vectorise, cpu/vector_math.h has
// a twin for the CPU's loops.
#define DD_ELEMENT_LOSSES(X)    \
  X(kL2, l2)                    \
  X(kL1, l1)                    \
  X(kHuber, huber)              \
  X(kSmoothL1, smooth_l1)       \
  X(kPseudoHuber, pseudo_huber) \
  X(kLogCosh, log_cosh)

#define DD_KIND(KIND, NAME) KIND,
enum LossKind : int32_t { DD_ELEMENT_LOSSES(DD_KIND) kLossKinds };
#undef DD_KIND

template <LossKind kKind>
struct LossTag {
  static constexpr LossKind kind = kKind;
};

template <typename acc_t>
DD_HD acc_t sign_of(acc_t d) {
  return d > 0 ? acc_t(1) : (d < 0 ? acc_t(-1) : d * acc_t(0));  // keeps NaN
}

template <typename acc_t>
DD_HD void l2_loss(acc_t d, acc_t, acc_t& loss, acc_t& slope) {
  loss = d * d;
  slope = 2 * d;
}

template <typename acc_t>
DD_HD void l1_loss(acc_t d, acc_t, acc_t& loss, acc_t& slope) {
  loss = std::fabs(d);
  slope = sign_of(d);
}

template <typename acc_t>
DD_HD void huber_loss(acc_t d, acc_t c, acc_t& loss, acc_t& slope) {
  const acc_t a = std::fabs(d);
  const bool inner = a <= c;
  loss = inner ? acc_t(0.5) * d * d : c * (a - acc_t(0.5) * c);
  slope = inner ? d : c * sign_of(d);
}

template <typename acc_t>
DD_HD void smooth_l1_loss(acc_t d, acc_t c, acc_t& loss, acc_t& slope) {
  const acc_t a = std::fabs(d);
  const bool inner = a < c;  // c = 0 is l1
  const acc_t safe = inner ? c : acc_t(1);
  loss = inner ? acc_t(0.5) * d * d / safe : a - acc_t(0.5) * c;
  slope = inner ? d / safe : sign_of(d);
}

// sqrt(d^2 + c^2) - c without its cancellation. c = 0 is |d|.
template <typename acc_t>
DD_HD void pseudo_huber_loss(acc_t d, acc_t c, acc_t& loss, acc_t& slope) {
  const acc_t root = std::sqrt(d * d + c * c);
  const bool zero = root == 0;
  const acc_t divisor = zero ? acc_t(1) : root;
  const bool straight = c == 0;
  loss = straight ? std::fabs(d) : d * d / (divisor + c);
  slope = straight ? sign_of(d) : d / divisor;
}

// log(cosh(d)): -log1p(-tanh^2(d)) / 2 near 0, |d| + log1p(e^(-2|d|)) - ln 2 elsewhere; within 4e-7 relative in fp32.
template <typename acc_t>
DD_HD void log_cosh_loss(acc_t d, acc_t, acc_t& loss, acc_t& slope) {
  const acc_t a = std::fabs(d);
  if (a < 1) {
    slope = std::tanh(d);
    loss = acc_t(-0.5) * std::log1p(-slope * slope);
  } else {
    const acc_t e = std::exp(-2 * a);  // NaN comes here too
    loss = a + std::log1p(e) - acc_t(0.693147180559945309417);
    slope = (d < 0 ? acc_t(-1) : acc_t(1)) * (1 - e) / (1 + e);
  }
}

// One element loss by its kind.
#define DD_ELEMENT_LOSS(KIND, NAME)                                                     \
  template <typename acc_t>                                                             \
  DD_HD void element_loss(LossTag<KIND>, acc_t d, acc_t c, acc_t& loss, acc_t& slope) { \
    NAME##_loss(d, c, loss, slope);                                                     \
  }
DD_ELEMENT_LOSSES(DD_ELEMENT_LOSS)
#undef DD_ELEMENT_LOSS

// visit(LossTag<kind>()) for every kind in turn.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // it is called on the host and on the device, each with functions of its own
#endif
template <typename visit_t>
DD_HD void for_each_loss(const visit_t& visit) {
#define DD_VISIT(KIND, NAME) visit(LossTag<KIND>());
  DD_ELEMENT_LOSSES(DD_VISIT)
#undef DD_VISIT
}

}  // namespace diffdoctor
