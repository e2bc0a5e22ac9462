// l2 over a run, in one pass: the loss that nearly every call asks for.
#pragma once

#include "cpu/tiles/chunk.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace diffdoctor {
namespace {

// kWeights: omega is an array, else 1. kModulated: so is omega * m, else it is omega. kFinite: no residual and no
// weight is infinite or NaN, so that a weight of 0 selects by itself.
template <typename shape_t, bool kWeights, bool kModulated, bool kGrad, bool kFinite = false, typename pred_t,
          typename term_t, typename acc_t>
acc_t l2_run(const Operands<pred_t, term_t>& operands, const Sample<acc_t>& sample, const BlockWeights<acc_t>& weights,
             acc_t grad_scale, int64_t n) {
  const Operands<pred_t, term_t> x = operands;  // copies: a store to grad must not make the compiler read them again
  const Sample<acc_t> s = sample;
  const acc_t *const weight = weights.weight, *const modulated = weights.modulated, *const level = weights.level;
  acc_t total = 0;
  DD_SIMD_SUM(total)
  for (int64_t i = 0; i < n; ++i) {
    acc_t d = residual<shape_t>(x, s, level, i);
    acc_t weighted = d;
    if (kWeights) {
      if (!kFinite) d = weight[i] == 0 ? acc_t(0) : d;  // selected out: a NaN must not come through
      weighted = weight[i] * d;
    }
    total += weighted * d;
    if (kGrad) {
      acc_t slope = weighted;
      if (kModulated) slope = modulated[i] == 0 ? acc_t(0) : modulated[i] * d;
      if constexpr (kFinite)
        from_number(slope * grad_scale, x.grad + i);
      else
        from_acc(slope * grad_scale, x.grad + i);
    }
  }
  return total;
}

// l2_run for finite values; false where something was not. A modulated weight may be infinite where omega is finite: it
// is not tried.
template <typename shape_t, bool kWeights, bool kModulated, bool kGrad, typename pred_t, typename term_t,
          typename acc_t>
bool l2_finite(const Operands<pred_t, term_t>& x, const Sample<acc_t>& s, const BlockWeights<acc_t>& weights,
               acc_t grad_scale, int64_t n, acc_t& total) {
  if (kModulated) return false;
  total = l2_run<shape_t, kWeights, kModulated, kGrad, true>(x, s, weights, grad_scale, n);
  return total - total == 0 && grad_scale - grad_scale == 0;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// By hand, since the compiler widens and narrows bf16 with twice the shuffles: 16 elements, those of `mask`.
inline __m512 load16(const float* in, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, in); }
inline __m512 load16(const bfloat16* in, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in)), 16));
}
inline __m512 load16(const float16* in, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in)); }
inline void store16(float16* out, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(out, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store16(float* out, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(out, mask, values); }
inline void store16(bfloat16* out, __mmask16 mask, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_mask_storeu_epi16(out, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <typename shape_t, bool kWeights, bool kModulated, bool kGrad, typename pred_t, typename term_t>
bool l2_finite(const Operands<pred_t, term_t>& x, const Sample<float>& s, const BlockWeights<float>& weights,
               float grad_scale, int64_t n, float& total) {
  constexpr int kTerms = shape_t::kTerms;
  // Copies, which a store to the gradient cannot change.
  const pred_t* const pred = x.pred;
  const term_t *const term_0 = x.term[0], *const term_1 = x.term[1], *const term_2 = x.term[2];
  const float *const weight = weights.weight, *const modulated = weights.modulated, *const level = weights.level;
  pred_t* const grad = x.grad;
  const __m512 pred_scale = _mm512_set1_ps(s.pred_scale), scale = _mm512_set1_ps(grad_scale);
  const __m512 first = _mm512_set1_ps(s.coef[0].clean), first_step = _mm512_set1_ps(s.coef[0].step);
  const __m512 second = _mm512_set1_ps(s.coef[1].clean), second_step = _mm512_set1_ps(s.coef[1].step);
  const __m512 third = _mm512_set1_ps(s.coef[2].clean), third_step = _mm512_set1_ps(s.coef[2].step);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __mmask16 nan = 0;
  const auto step = [=, &nan](int64_t i, __mmask16 mask, __m512& sum) {
    __m512 d = _mm512_mul_ps(pred_scale, load16(pred + i, mask));
    const __m512 u = shape_t::kSpatial ? load16(level + i, mask) : _mm512_setzero_ps();
    const auto coef = [u](__m512 clean, __m512 change) {
      return shape_t::kSpatial ? _mm512_fmadd_ps(change, u, clean) : clean;
    };
    if (kTerms > 0) d = _mm512_fnmadd_ps(coef(first, first_step), load16(term_0 + i, mask), d);
    if (kTerms > 1) d = _mm512_fnmadd_ps(coef(second, second_step), load16(term_1 + i, mask), d);
    if (kTerms > 2) d = _mm512_fnmadd_ps(coef(third, third_step), load16(term_2 + i, mask), d);
    const __m512 weighted = kWeights ? _mm512_mul_ps(load16(weight + i, mask), d) : d;
    sum = _mm512_fmadd_ps(weighted, d, sum);
    if (!kGrad) return;
    __m512 slope = weighted;
    if (kModulated) slope = _mm512_mul_ps(load16(modulated + i, mask), d);
    slope = _mm512_mul_ps(slope, scale);
    if (kModulated) nan |= _mm512_cmp_ps_mask(slope, slope, _CMP_UNORD_Q);
    store16(grad + i, mask, slope);
  };
  // Asked for ahead of the hardware's prefetcher, which starts anew at each page. Past a block's end it is the next
  // range, which the cache still holds when its turn comes.
  const auto ask = [](const auto* from, auto written) {
    constexpr int64_t kItem = sizeof(*from), kAhead = 1536 / kItem, kLine = 64 / kItem;
    for (int64_t line = 0; line < 32; line += kLine)
      __builtin_prefetch(from + kAhead + line, decltype(written)::value, 3);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    ask(pred + i, std::false_type());
    if (kTerms > 0) ask(term_0 + i, std::false_type());
    if (kTerms > 1) ask(term_1 + i, std::false_type());
    if (kTerms > 2) ask(term_2 + i, std::false_type());
    if (kGrad) ask(grad + i, std::true_type());
    step(i, 0xffff, sums[0]);
    step(i + 16, 0xffff, sums[1]);
  }
  for (; i < n; i += 16) step(i, n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff, sums[0]);
  total = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  return nan == 0 && total - total == 0 && grad_scale - grad_scale == 0;
}
#endif

}  // namespace
}  // namespace diffdoctor
