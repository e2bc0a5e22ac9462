// Element losses and their derivatives, in float or double. d is prediction minus target, c the Huber threshold.
#pragma once

#include <cmath>

#include "common/platform.h"
#include "common/weighted_loss_params.h"

namespace diffdoctor {

template <typename acc_t>
DD_HD acc_t sign_of(acc_t d) {
  return d > 0 ? acc_t(1) : (d < 0 ? acc_t(-1) : d * acc_t(0));  // keeps NaN
}

template <typename acc_t>
DD_HD void l2_loss(acc_t d, acc_t& loss, acc_t& slope) {
  loss = d * d;
  slope = 2 * d;
}

template <typename acc_t>
DD_HD void l1_loss(acc_t d, acc_t& loss, acc_t& slope) {
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
DD_HD void log_cosh_loss(acc_t d, acc_t& loss, acc_t& slope) {
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

// The weighted sum of the named losses. A kind whose strength is 0 is not evaluated; the branches are uniform.
template <typename acc_t>
DD_HD void element_loss(const double* strength, acc_t d, acc_t c, acc_t& loss, acc_t& slope) {
  acc_t total = 0, total_slope = 0, l, s;
  if (strength[kL2] != 0) {
    l2_loss(d, l, s);
    total += acc_t(strength[kL2]) * l;
    total_slope += acc_t(strength[kL2]) * s;
  }
  if (strength[kL1] != 0) {
    l1_loss(d, l, s);
    total += acc_t(strength[kL1]) * l;
    total_slope += acc_t(strength[kL1]) * s;
  }
  if (strength[kHuber] != 0) {
    huber_loss(d, c, l, s);
    total += acc_t(strength[kHuber]) * l;
    total_slope += acc_t(strength[kHuber]) * s;
  }
  if (strength[kSmoothL1] != 0) {
    smooth_l1_loss(d, c, l, s);
    total += acc_t(strength[kSmoothL1]) * l;
    total_slope += acc_t(strength[kSmoothL1]) * s;
  }
  if (strength[kPseudoHuber] != 0) {
    pseudo_huber_loss(d, c, l, s);
    total += acc_t(strength[kPseudoHuber]) * l;
    total_slope += acc_t(strength[kPseudoHuber]) * s;
  }
  if (strength[kLogCosh] != 0) {
    log_cosh_loss(d, l, s);
    total += acc_t(strength[kLogCosh]) * l;
    total_slope += acc_t(strength[kLogCosh]) * s;
  }
  loss = total;
  slope = total_slope;
}

}  // namespace diffdoctor
