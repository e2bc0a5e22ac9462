// Elementary functions in plain arithmetic, so that loops over them vectorise; libm's calls take 20 to 100 ns each.
// Coefficients: Chebyshev fits made for this file; the stated errors include fp32 rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/losses.h"

namespace diffdoctor {
namespace {

// c[0] * x^n + ... + c[n] by Horner's rule; the leading coefficient first.
inline float polynomial(float, float sum) { return sum; }
template <typename... rest_t>
float polynomial(float x, float sum, float next, rest_t... rest) {
  return polynomial(x, sum * x + next, rest...);
}

// At most 1, of what is at least 0, compared by the bits, which for such numbers are in the same order: one
// instruction, where GCC makes three of a comparison. Of a negative number or a NaN, anything.
inline float at_most_one(float x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x)), one = 0x3f800000;
  return bits_to_float(static_cast<uint32_t>(bits < one ? bits : one));
}

inline double at_most_one(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int64_t one = 0x3ff0000000000000;
  bits = bits < one ? bits : one;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// region of common/weighted_loss.h.
template <typename acc_t>
acc_t vector_region(acc_t value) {
  return value > 0 ? at_most_one(value) : acc_t(0);
}

// e^x for x <= 0 in fp32 to 2 ulp: 2^k times a polynomial on |r| <= ln2/2. Below -87 it stays at e^-87.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const int32_t whole = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float n = static_cast<float>(whole);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float q =
      polynomial(r, 1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f);
  return q * bits_to_float(static_cast<uint32_t>(whole + 127) << 23);
}

inline double exp_nonpositive(double x) { return std::exp(x); }

// e^x of any x in fp32 to 2 ulp, exactly 1 at 0; 0 and infinity beyond the range, NaN for a NaN. Two powers of two are
// multiplied, since one alone would leave the exponent's range before the result does.
inline float vector_exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float whole = x * 1.44269504f;
  const int32_t k = static_cast<int32_t>(whole + (whole < 0 ? -0.5f : 0.5f)), half = k / 2;
  const float n = static_cast<float>(k);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float q =
      polynomial(r, 1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f);
  return q * bits_to_float(static_cast<uint32_t>(half + 127) << 23) *
         bits_to_float(static_cast<uint32_t>(k - half + 127) << 23);
}

inline double vector_exp(double x) { return std::exp(x); }

// log cosh and tanh of a >= 1 through e = e^(-2a).
inline void log_cosh_far(float a, float& loss, float& slope) {
  const float e = exp_nonpositive(-2 * a);
  // log1p(e) / e for e <= e^-2
  const float tail = polynomial(e, -0.119623844f, 0.193346178f, -0.24954998f, 0.333319369f, -0.49999984f, 1.0f);
  loss = a - 0.693147181f + tail * e;
  slope = (1 - e) / (1 + e);
}

// An element loss as a loop over many elements takes it: as common/losses.h defines it, unless a twin stands below.
template <LossKind kKind, typename acc_t>
DD_HD void vector_loss(LossTag<kKind> tag, acc_t d, acc_t c, acc_t& loss, acc_t& slope) {
  element_loss(tag, d, c, loss, slope);
}

// log cosh d and tanh d within 3e-7 relative: polynomials in d^2 up to |d| = 1, and what is added beyond. A choice
// between the two would put branches into the loop.
DD_HD void vector_loss(LossTag<kLogCosh>, float d, float, float& loss, float& slope) {
  const float a = d < 0 ? -d : d;
  const float inner = a < 1 ? a : 1.0f;
  const float outer = a < 1 ? 1.0f : a;  // a NaN goes this way
  const float z = inner * inner;
  // log(cosh(d)) / d^2
  const float near = polynomial(z, 8.65409426e-05f, -0.000556135327f, 0.00207724497f, -0.00671038477f, 0.0222165624f,
                                -0.0833329914f, 0.499999997f);
  // tanh(d) / d
  const float ratio = polynomial(z, -0.000354883412f, 0.00228764549f, -0.0079249463f, 0.0214699806f, -0.0538727388f,
                                 0.133321905f, -0.333332806f, 0.999999996f);
  float far_loss, far_slope, one_loss, one_slope;
  log_cosh_far(outer, far_loss, far_slope);
  log_cosh_far(1.0f, one_loss, one_slope);
  loss = near * z + (far_loss - one_loss);
  slope = std::copysign(ratio * inner + (far_slope - one_slope), d);
}

}  // namespace
}  // namespace diffdoctor
