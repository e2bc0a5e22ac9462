// Reading a map at a grid position: the index arithmetic of torch.nn.functional.interpolate (align_corners=False).
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/platform.h"
#include "common/types.h"

namespace diffdoctor {

// Window [begin, end) of the input that area averaging maps to output position i.
DD_HD int64_t area_begin(int64_t i, int64_t in, int64_t out) { return i * in / out; }
DD_HD int64_t area_end(int64_t i, int64_t in, int64_t out) { return ((i + 1) * in + out - 1) / out; }

// ATen computes nearest indices in fp32 for every dtype.
DD_HD int64_t nearest_index(int64_t i, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const int64_t index = static_cast<int64_t>(std::floor(static_cast<float>(i) * scale));
  return index < in - 1 ? index : in - 1;
}

DD_HD int64_t nearest_exact_index(int64_t i, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const int64_t index = static_cast<int64_t>(std::floor((static_cast<float>(i) + 0.5f) * scale));
  return index < in - 1 ? index : in - 1;
}

// a * b, rounded before anything is added to it.
template <typename acc_t>
DD_HD acc_t rounded_product(acc_t a, acc_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(acc_t) == sizeof(double))
    return __dmul_rn(a, b);
  else
    return __fmul_rn(a, b);
#elif defined(__GNUC__) && defined(__x86_64__)
  acc_t product = a * b;
  __asm__("" : "+x"(product));
  return product;
#elif defined(__GNUC__) && defined(__aarch64__)
  acc_t product = a * b;
  __asm__("" : "+w"(product));
  return product;
#else
  volatile acc_t product = a * b;
  return product;
#endif
}

// The first neighbour of output position i and the weight of the second; scale = in / out. A position that is a whole
// number must come out as one, or a neighbour that weighs nothing gets a weight: with 3 rows for 7, a fused
// multiply-add misses row 1.
template <typename index_t, typename acc_t>
DD_HD index_t bilinear_first(index_t i, index_t in, acc_t scale, acc_t& weight) {
  acc_t source = rounded_product(scale, static_cast<acc_t>(i) + acc_t(0.5)) - acc_t(0.5);
  source = source < 0 ? acc_t(0) : source;
  index_t first = static_cast<index_t>(source);
  first = first < in - 1 ? first : in - 1;
  weight = source - static_cast<acc_t>(first);
  weight = weight < 0 ? acc_t(0) : (weight > 1 ? acc_t(1) : weight);
  return first;
}

// The two neighbours.
template <typename acc_t>
DD_HD void bilinear_index(int64_t i, int64_t in, int64_t out, int64_t& first, int64_t& second, acc_t& weight) {
  first = bilinear_first(i, in, static_cast<acc_t>(in) / static_cast<acc_t>(out), weight);
  second = first + (first < in - 1 ? 1 : 0);
}

template <typename acc_t>
DD_HD acc_t map_at(const Map& map, int64_t b, int64_t t, int64_t y, int64_t x) {
  const int64_t index = b * map.batch_stride + t * map.in_stride[0] + y * map.in_stride[1] + x * map.in_stride[2];
  return load_element<acc_t>(map.data, map.dtype, index);
}

// Sum of the window in row-major order, then the divisions, one per axis.
template <typename acc_t>
DD_HD acc_t area_value(const Map& map, const int64_t* grid, int64_t b, int64_t t, int64_t y, int64_t x) {
  const int64_t t0 = area_begin(t, map.in_size[0], grid[0]), t1 = area_end(t, map.in_size[0], grid[0]);
  const int64_t y0 = area_begin(y, map.in_size[1], grid[1]), y1 = area_end(y, map.in_size[1], grid[1]);
  const int64_t x0 = area_begin(x, map.in_size[2], grid[2]), x1 = area_end(x, map.in_size[2], grid[2]);
  acc_t sum = 0;
  for (int64_t i = t0; i < t1; ++i)
    for (int64_t j = y0; j < y1; ++j)
      for (int64_t k = x0; k < x1; ++k) sum += map_at<acc_t>(map, b, i, j, k);
  return sum / static_cast<acc_t>(t1 - t0) / static_cast<acc_t>(y1 - y0) / static_cast<acc_t>(x1 - x0);
}

template <typename acc_t>
DD_HD acc_t bilinear_value(const Map& map, const int64_t* grid, int64_t b, int64_t t, int64_t y, int64_t x) {
  int64_t y0, y1, x0, x1, t0, t1;
  acc_t wt, wy, wx;
  bilinear_index(t, map.in_size[0], grid[0], t0, t1, wt);
  bilinear_index(y, map.in_size[1], grid[1], y0, y1, wy);
  bilinear_index(x, map.in_size[2], grid[2], x0, x1, wx);
  const acc_t near_top = (1 - wx) * map_at<acc_t>(map, b, t0, y0, x0) + wx * map_at<acc_t>(map, b, t0, y0, x1);
  const acc_t near_bottom = (1 - wx) * map_at<acc_t>(map, b, t0, y1, x0) + wx * map_at<acc_t>(map, b, t0, y1, x1);
  const acc_t near = (1 - wy) * near_top + wy * near_bottom;
  if (t0 == t1 || wt == 0) return near;
  const acc_t far_top = (1 - wx) * map_at<acc_t>(map, b, t1, y0, x0) + wx * map_at<acc_t>(map, b, t1, y0, x1);
  const acc_t far_bottom = (1 - wx) * map_at<acc_t>(map, b, t1, y1, x0) + wx * map_at<acc_t>(map, b, t1, y1, x1);
  return (1 - wt) * near + wt * ((1 - wy) * far_top + wy * far_bottom);
}

// A map whose size differs from the grid's, at grid position (t, y, x). The mode must not be kAbsent or kSame.
template <typename acc_t>
DD_HD acc_t resampled_value(const Map& map, const int64_t* grid, int64_t b, int64_t t, int64_t y, int64_t x) {
  switch (map.mode) {
    case kArea:
      return area_value<acc_t>(map, grid, b, t, y, x);
    case kBilinear:
      return bilinear_value<acc_t>(map, grid, b, t, y, x);
    case kNearest:
      return map_at<acc_t>(map, b, nearest_index(t, map.in_size[0], grid[0]), nearest_index(y, map.in_size[1], grid[1]),
                           nearest_index(x, map.in_size[2], grid[2]));
    default:
      return map_at<acc_t>(map, b, nearest_exact_index(t, map.in_size[0], grid[0]),
                           nearest_exact_index(y, map.in_size[1], grid[1]),
                           nearest_exact_index(x, map.in_size[2], grid[2]));
  }
}

}  // namespace diffdoctor
