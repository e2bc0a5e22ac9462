// weighted_loss for packed tokens "b (h w) (c 2 2)" (FLUX) with l2 alone and no sums, whose terms and maps may lie in
// any way along h, w and c, as 4-D latents do. Maps may be of any size.
#pragma once

#include <cstdint>

#include "common/weighted_loss_params.h"
#include "cuda/tiling.h"

namespace diffdoctor::cuda {

// Four lanes share a token; a block has 64 tokens and one group of channels.
constexpr int kTokensPerBlock = 64;

struct TokenTiling {
  int32_t columns;             // tokens of a row of the picture
  int32_t tokens, channels;    // of a sample
  int32_t channels_per_group;  // a multiple of 4 unless it holds all
  int32_t groups;
  int32_t tiles;  // of a sample; a block works on one
};

inline TokenTiling token_tiling(const WeightedLossParams& p) {
  TokenTiling t{};
  t.columns = static_cast<int32_t>(p.size[2]);
  t.tokens = static_cast<int32_t>(p.size[1] * p.size[2]);
  t.channels = static_cast<int32_t>(p.size[3]);
  const int64_t pieces = ceil_div(t.tokens, kTokensPerBlock);
  t.groups = 1;
  // Each group works out the positions anew.
  while (pieces * t.groups * p.batch < kTargetBlocks / 2 && t.channels >= 8 * t.groups) t.groups *= 2;
  t.channels_per_group = static_cast<int32_t>(ceil_div(t.channels, 4 * t.groups) * 4);
  t.groups = static_cast<int32_t>(ceil_div(t.channels, t.channels_per_group));
  t.tiles = static_cast<int32_t>(pieces * t.groups);
  return t;
}

// Whether launch_tokens serves a plan, whatever the addresses.
bool tokens_serve(const WeightedLossParams& p);

// Whether it serves the call.
bool tokens_serve_call(const WeightedLossParams& p);

const char* launch_tokens(const WeightedLossParams& p, void* workspace, void* stream);

}  // namespace diffdoctor::cuda
