// What the parameters of every op are made of. No torch, no CUDA headers: with <op>_params.h this is the interface
// between the Python lowering (diffdoctor/lowering/plan.py) and the kernels.
#pragma once

#include <cstdint>

namespace diffdoctor {

// The numeric values are shared with diffdoctor/lowering/plan.py.
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kUInt8 = 4, kBool = 5 };

// How a map reaches the grid. kSame: the map has the grid's size and is read through `stride`, like any operand.
enum MapMode : int32_t { kAbsent = 0, kSame = 1, kArea = 2, kBilinear = 3, kNearest = 4, kNearestExact = 5 };

enum Reduction : int32_t { kMean = 0, kSample = 1, kSum = 2 };

constexpr int kMaxDims = 6;

// A tensor over the iteration space: element (b, i_0 .. i_5) is at b * batch_stride + sum_d i_d * stride[d] elements.
struct Operand {
  void* data;
  int64_t batch_stride;
  int64_t stride[kMaxDims];
  int32_t dtype;
  int32_t present;
};

struct Map {
  const void* data;
  int64_t batch_stride;
  int64_t stride[kMaxDims];  // kSame: over the iteration space
  int64_t in_size[3];        // otherwise: the map's own (T', H', W') and their strides
  int64_t in_stride[3];
  int32_t dtype;
  int32_t mode;
};

// One number per sample in the accumulation type: data[b * stride] where data is set, else value.
struct PerSample {
  const void* data;
  int64_t stride;  // any; 0 where one number serves all
  double value;
};

// A list of parameters is a macro that calls X(type, name) for each; this makes them the fields of a struct.
#define DD_FIELD(TYPE, NAME) TYPE NAME;

}  // namespace diffdoctor
