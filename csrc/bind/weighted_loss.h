// From Python's plan (diffdoctor/backends/native_call.py) to the C++ structs: the static half once per plan, addresses
// and per-sample numbers per call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/weighted_loss_params.h"

namespace diffdoctor {

namespace py = pybind11;

struct WeightedLossPlan {
  WeightedLossParams params;

  explicit WeightedLossPlan(const py::dict& d) {
    std::memset(&params, 0, sizeof(params));
    params.batch = d["batch"].cast<int64_t>();
    params.count = d["count"].cast<int64_t>();
    copy_into(d["size"], params.size, kMaxDims);
    params.ndim = d["ndim"].cast<int32_t>();
    params.pred_dtype = d["dtype"].cast<int32_t>();
    params.contiguous = d["contiguous"].cast<bool>() ? 1 : 0;
    fill_operand(params.pred, d["pred"]);
    fill_operand(params.grad, d["grad"]);
    const py::tuple terms = d["terms"].cast<py::tuple>();
    params.num_terms = static_cast<int32_t>(terms.size());
    if (params.num_terms > kMaxTerms) throw std::invalid_argument("too many terms");
    for (int k = 0; k < params.num_terms; ++k) fill_operand(params.term[k], terms[k]);
    if (!d["weighting"].is_none()) fill_operand(params.weighting, d["weighting"]);
    if (!d["confidence"].is_none()) fill_map(params.confidence, d["confidence"]);
    if (!d["mask"].is_none()) fill_map(params.mask, d["mask"]);
    const py::tuple coord = d["coord"].cast<py::tuple>();
    for (int axis = 0; axis < 3; ++axis) copy_into(coord[axis], params.coord[axis], kMaxDims);
    copy_into(d["grid"], params.grid, 3);
    const py::tuple strength = d["strength"].cast<py::tuple>();
    for (int k = 0; k < kLossKinds; ++k) params.strength[k] = strength[k].cast<double>();
    params.artifact_weight = d["artifact_weight"].cast<double>();
    params.clean_weight = d["clean_weight"].cast<double>();
    params.artifact_grad = d["artifact_grad"].cast<double>();
    params.clean_grad = d["clean_grad"].cast<double>();
    params.threshold = d["threshold"].cast<double>();
    params.gamma = d["gamma"].cast<double>();
    params.reduction = d["reduction"].cast<int32_t>();
  }

  static void copy_into(const py::handle& values, int64_t* out, size_t n) {
    const py::tuple from = values.cast<py::tuple>();
    if (from.size() != n) throw std::invalid_argument("a plan's tuple has the wrong length");
    for (size_t i = 0; i < n; ++i) out[i] = from[i].cast<int64_t>();
  }

  // (dtype, (batch stride, six strides))
  static void fill_operand(Operand& x, const py::handle& description) {
    const py::tuple from = description.cast<py::tuple>();
    int64_t strides[kMaxDims + 1];
    copy_into(from[1], strides, kMaxDims + 1);
    x.dtype = from[0].cast<int32_t>();
    x.present = 1;
    x.batch_stride = strides[0];
    std::memcpy(x.stride, strides + 1, sizeof(x.stride));
  }

  // (dtype, mode, (batch stride, six strides), in_size, in_stride)
  static void fill_map(Map& map, const py::handle& description) {
    const py::tuple from = description.cast<py::tuple>();
    int64_t strides[kMaxDims + 1];
    copy_into(from[2], strides, kMaxDims + 1);
    map.dtype = from[0].cast<int32_t>();
    map.mode = from[1].cast<int32_t>();
    map.batch_stride = strides[0];
    std::memcpy(map.stride, strides + 1, sizeof(map.stride));
    copy_into(from[3], map.in_size, 3);
    copy_into(from[4], map.in_stride, 3);
  }
};

inline void* address(const py::tuple& pointers, size_t k) {
  return PyLong_AsVoidPtr(PyTuple_GET_ITEM(pointers.ptr(), static_cast<Py_ssize_t>(k)));
}

// None: 1. A float: that number. (address, stride): one number per sample.
inline PerSample per_sample_of(PyObject* value) {
  if (value == Py_None) return {nullptr, 0, 1.0};
  if (PyFloat_Check(value)) return {nullptr, 0, PyFloat_AS_DOUBLE(value)};
  return {PyLong_AsVoidPtr(PyTuple_GET_ITEM(value, 0)), PyLong_AsLongLong(PyTuple_GET_ITEM(value, 1)), 1.0};
}

// pointers: pred, grad, term 0, term 1, weighting, confidence, mask, loss, sums (0 where absent).
// per_sample: pred_scale, coef 0, coef 1, huber_c, weight, z, grad_output.
inline WeightedLossParams bind_call(const WeightedLossPlan& plan, int work, const py::tuple& pointers,
                                    const py::tuple& per_sample) {
  if (pointers.size() != 9 || per_sample.size() != 7) throw std::invalid_argument("expected 9 pointers and 7 numbers");
  WeightedLossParams p = plan.params;
  p.work = work;
  p.pred.data = address(pointers, 0);
  p.grad.data = address(pointers, 1);
  p.term[0].data = address(pointers, 2);
  p.term[1].data = address(pointers, 3);
  p.weighting.data = address(pointers, 4);
  p.confidence.data = address(pointers, 5);
  p.mask.data = address(pointers, 6);
  p.loss = address(pointers, 7);
  p.sums = address(pointers, 8);
  PerSample* const targets[] = {&p.pred_scale, &p.coef[0], &p.coef[1], &p.huber_c, &p.weight, &p.z, &p.grad_output};
  for (int k = 0; k < 7; ++k) *targets[k] = per_sample_of(PyTuple_GET_ITEM(per_sample.ptr(), k));
  if (PyErr_Occurred()) throw py::error_already_set();
  return p;
}

// logits, (batch, row, column strides), (batch, h, w), (H, W), threshold, dtype, method, reduction, loss, kept, factor.
inline ArtifactLossParams bind_artifact_loss(const py::tuple& d) {
  if (d.size() != 11) throw std::invalid_argument("expected 11 entries");
  const auto pointer = [&](size_t k) { return reinterpret_cast<void*>(d[k].cast<uintptr_t>()); };
  const auto stride = d[1].cast<std::array<int64_t, 3>>();
  const auto shape = d[2].cast<std::array<int64_t, 3>>();
  const auto size = d[3].cast<std::array<int64_t, 2>>();
  ArtifactLossParams p;
  p.logits = pointer(0);
  p.batch_stride = stride[0];
  p.row_stride = stride[1];
  p.col_stride = stride[2];
  p.batch = shape[0];
  p.in_h = shape[1];
  p.in_w = shape[2];
  p.out_h = size[0];
  p.out_w = size[1];
  p.threshold = d[4].cast<double>();
  p.dtype = d[5].cast<int32_t>();
  p.method = d[6].cast<int32_t>();
  p.reduction = d[7].cast<int32_t>();
  p.loss = pointer(8);
  p.kept = pointer(9);
  p.factor = pointer(10);
  p.write_grad = p.kept != nullptr;
  return p;
}

}  // namespace diffdoctor
