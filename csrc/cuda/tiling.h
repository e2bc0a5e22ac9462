// How the elements of a sample are cut into tiles. Host code only.
//
// Maps and weighting usually do not vary along the channels, so what they say is computed once per position and used
// for all of them: element (o, f, q) is the (o * free + f) * inner + q'th of a sample, and its position is o * inner +
// q.
//   (C, HW)          one map for all channels:  outer 1,  free C, inner HW
//   (HW, C)          channels_last, tokens:     outer HW, free C, inner 1
//   (HW, C, ph pw)   packed tokens:             outer HW, free C, inner ph pw
//   (n)              no maps, or a weighting of full size: outer 1, free 1, inner n
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/platform.h"
#include "common/weighted_loss_params.h"

namespace diffdoctor::cuda {

// Elements that a thread loads at once: 16 bytes of model_pred.
DD_HD constexpr int vector_width(int32_t pred_dtype) {
  return pred_dtype == kFloat64 ? 2 : pred_dtype == kFloat32 ? 4 : 8;
}

// Positions of a tile at most; each needs up to three numbers in shared memory.
DD_HD constexpr int tile_positions(int32_t pred_dtype) { return pred_dtype == kFloat64 ? 1024 : 2048; }

constexpr int64_t kRunPositions = 256;    // an inner extent from which a tile is cut out of a single o
constexpr int64_t kTileElements = 16384;  // of a tile without maps, or with several o's
constexpr int64_t kTargetBlocks = 512;  // smaller tiles until there are so many, whatever the GPU: the same bits on all
constexpr int64_t kSmallTile = 2048;    // elements; a tile is not made smaller than this

struct Tiling {
  int64_t outer, free, inner;
  int64_t tiles;            // of a sample; a block works on one
  int64_t outers_per_tile;  // tiles of whole o's; 0: a tile is a piece of one o, for the f of one group
  int64_t free_per_group;
  int32_t positions;  // of a full tile
  int32_t groups;
  int32_t spatial;  // there is a map or a weighting
  int32_t narrow;   // indices within a sample fit 31 bits
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// outer, free, inner: the plan's free dims and what lies around them.
inline void split_positions(const WeightedLossParams& p, bool with_weighting, Tiling& t) {
  t.outer = t.free = 1;
  t.inner = p.count;
  if (!t.spatial) return;
  const DimRange& range = with_weighting ? p.free_dims_weighted : p.free_dims;
  t.inner = 1;
  for (int d = 0; d < kMaxDims; ++d) (d < range[0] ? t.outer : d < range[1] ? t.free : t.inner) *= p.size[d];
  // A tile of whole o's holds every f; where that is too many, each element is a position of its own.
  if (t.inner < kRunPositions && t.free * t.inner > kTileElements) {
    t.outer = t.free = 1;
    t.inner = p.count;
  }
}

// Tiles that are pieces of one o.
inline void cut_runs(int64_t batch, int64_t limit, int width, Tiling& t) {
  int64_t positions = std::min(limit, t.inner);
  const auto pieces = [&]() { return t.outer * ceil_div(t.inner, positions); };
  while (pieces() * batch < kTargetBlocks && positions >= 2 * kRunPositions && positions * t.free >= 2 * kSmallTile) {
    positions = ceil_div(positions / 2, width) * width;
  }
  if (positions < t.inner) positions = std::max<int64_t>(width, positions / width * width);
  while (pieces() * t.groups * batch < kTargetBlocks / 2 && t.free / (2 * t.groups) * positions >= kSmallTile) {
    t.groups *= 2;
  }
  const int64_t most = (int64_t{1} << 18) / positions + 1;  // so that a tile's elements are counted in 32 bits
  t.free_per_group = std::min(ceil_div(t.free, t.groups), most);
  t.groups = static_cast<int32_t>(ceil_div(t.free, t.free_per_group));
  t.positions = static_cast<int32_t>(positions);
  t.tiles = pieces() * t.groups;
}

// Tiles of whole o's.
inline void cut_outers(int64_t batch, int64_t limit, int width, Tiling& t) {
  const int64_t row = t.free * t.inner;
  int64_t outers = std::min({limit / t.inner, kTileElements / row, t.outer});
  while (ceil_div(t.outer, outers) * batch < kTargetBlocks && outers >= 2 && outers * row >= 2 * kSmallTile)
    outers /= 2;
  while (outers < t.outer && outers > 1 && outers * row % width != 0) outers -= 1;
  t.outers_per_tile = outers;
  t.positions = static_cast<int32_t>(outers * t.inner);
  t.tiles = ceil_div(t.outer, outers);
}

inline Tiling make_tiling(const WeightedLossParams& p, bool with_weighting) {
  Tiling t{};
  t.spatial = p.confidence.mode != kAbsent || p.mask.mode != kAbsent || (with_weighting && p.weighting.present);
  t.narrow = p.count < (int64_t{1} << 31);
  split_positions(p, with_weighting, t);
  t.groups = 1;
  t.free_per_group = t.free;
  const int64_t limit = t.spatial ? tile_positions(p.dtype) : kTileElements;
  const int width = vector_width(p.dtype);
  if (t.inner >= kRunPositions || t.inner == p.count) {
    cut_runs(p.batch, limit, width, t);
  } else {
    cut_outers(p.batch, limit, width, t);
  }
  return t;
}

// Every tile starts, and every run of a tile ends, at a multiple of `width` elements.
inline bool tiles_are_aligned(const WeightedLossParams& p, const Tiling& t, int width) {
  if (p.count % width != 0) return false;
  if (t.outers_per_tile != 0) return t.tiles == 1 || t.outers_per_tile * t.free * t.inner % width == 0;
  return t.inner % width == 0 && (t.positions % width == 0 || t.positions == t.inner);
}

}  // namespace diffdoctor::cuda
