// The sums behind LossStats (see Sum in common/weighted_loss_params.h): short ones in acc_t, all of them in double.
#pragma once

#include "cpu/tiles/chunk.h"

namespace diffdoctor {
namespace {

constexpr int64_t kShortSum = 512;  // elements added in acc_t

// Adds a piece's share. weight: omega * v, 0 where an element is left out.
template <typename acc_t, typename level_t, typename omega_t>
DD_NOINLINE void add_sums_of(const level_t u, const omega_t omega, const acc_t* weight, const acc_t* loss, int64_t n,
                             double* sums) {
  acc_t numerator = 0, all_omega = 0, artifact_loss = 0, artifact_weight = 0, clean_loss = 0, clean_weight = 0;
  acc_t artifact = 0, nonfinite = 0;
  DD_SIMD_SUM(numerator, all_omega, artifact_loss, artifact_weight, clean_loss, clean_weight, artifact, nonfinite)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t level = u(i), l = loss[i], weighted = weight[i] * loss[i];
    const bool counts = weight[i] != 0;
    all_omega += omega(i);
    artifact += level;
    numerator += counts ? weighted : acc_t(0);
    artifact_weight += counts ? level : acc_t(0);
    clean_weight += counts ? 1 - level : acc_t(0);
    // A loss that is not finite does not count where its share is 0.
    artifact_loss += (counts & (level != 0)) ? level * l : acc_t(0);
    clean_loss += counts & (level != 1) ? (1 - level) * l : acc_t(0);
    nonfinite += counts & !(weighted - weighted == 0) ? acc_t(1) : acc_t(0);
  }
  sums[kSumNumerator] += numerator;
  sums[kSumWeight] += all_omega;
  sums[kSumArtifactLoss] += artifact_loss;
  sums[kSumArtifactWeight] += artifact_weight;
  sums[kSumCleanLoss] += clean_loss;
  sums[kSumCleanWeight] += clean_weight;
  sums[kSumArtifact] += artifact;
  sums[kSumNonfinite] += nonfinite;
}

template <typename acc_t>
void add_sums(const acc_t* u, const acc_t* omega, const acc_t* weight, const acc_t* loss, int64_t n, double* sums) {
  add_sums_of([u](int64_t i) { return u[i]; }, [omega](int64_t i) { return omega[i]; }, weight, loss, n, sums);
}

// The same where there is no map: u is 0 and omega a number.
template <typename acc_t>
void add_plain_sums(acc_t omega, const acc_t* weight, const acc_t* loss, int64_t n, double* sums) {
  add_sums_of([](int64_t) { return acc_t(0); }, [omega](int64_t) { return omega; }, weight, loss, n, sums);
}

// The two halves of it for blocks that share their maps, where v is one number for the sample. What the maps add is the
// same for each of `blocks` blocks.
template <typename acc_t, typename level_t, typename omega_t>
DD_NOINLINE void add_map_sums(const level_t u, const omega_t omega, int64_t n, double blocks, double* sums) {
  for (int64_t begin = 0; begin < n; begin += kShortSum) {
    const int64_t end = n - begin < kShortSum ? n : begin + kShortSum;
    acc_t all_omega = 0, artifact = 0, artifact_weight = 0, clean_weight = 0;
    DD_SIMD_SUM(all_omega, artifact, artifact_weight, clean_weight)
    for (int64_t i = begin; i < end; ++i) {
      const acc_t level = u(i);
      const bool counts = omega(i) != 0;
      all_omega += omega(i);
      artifact += level;
      artifact_weight += counts ? level : acc_t(0);
      clean_weight += counts ? 1 - level : acc_t(0);
    }
    sums[kSumWeight] += blocks * all_omega;
    sums[kSumArtifact] += blocks * artifact;
    sums[kSumArtifactWeight] += blocks * artifact_weight;
    sums[kSumCleanWeight] += blocks * clean_weight;
  }
}

// What l2 losses add, but for the numerator. d: at most kShortSum residuals, 0 where omega is.
template <typename acc_t, typename level_t, typename omega_t>
DD_NOINLINE void add_l2_sums(const level_t u, const omega_t omega, const acc_t* d, acc_t strength, acc_t v, int64_t n,
                             double* sums) {
  acc_t artifact_loss = 0, clean_loss = 0, nonfinite = 0;
  DD_SIMD_SUM(artifact_loss, clean_loss, nonfinite)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t level = u(i), l = strength * d[i] * d[i], weighted = omega(i) * v * l;
    const bool counts = omega(i) != 0;
    artifact_loss += (counts & (level != 0)) ? level * l : acc_t(0);
    clean_loss += counts & (level != 1) ? (1 - level) * l : acc_t(0);
    nonfinite += counts & !(weighted - weighted == 0) ? acc_t(1) : acc_t(0);
  }
  sums[kSumArtifactLoss] += artifact_loss;
  sums[kSumCleanLoss] += clean_loss;
  sums[kSumNonfinite] += nonfinite;
}

}  // namespace
}  // namespace diffdoctor
