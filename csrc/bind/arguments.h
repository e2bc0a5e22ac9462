// Reading what Python gives: numbers, addresses and strides; nothing of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"

namespace diffdoctor {

namespace py = pybind11;

inline void* as_pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// For a tensor that must be there. One that has no memory (freed, or standing for another) has the address 0, plus its
// offset into nothing: no memory is ever mapped there.
inline void need(const void* data, const char* name) {
  if (reinterpret_cast<uintptr_t>(data) < 65536)
    throw std::invalid_argument(std::string(name) + ": expected a tensor whose memory holds its values, got address 0");
}

inline void* pointer_at(const py::tuple& addresses, size_t k) {
  return PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(k)));
}

// None: 1. A float: that number. (address, stride): one number per sample.
inline PerSample per_sample_at(const py::tuple& numbers, size_t k) {
  PyObject* const value = PyTuple_GET_ITEM(numbers.ptr(), static_cast<Py_ssize_t>(k));
  if (value == Py_None) return {nullptr, 0, 1.0};
  if (PyFloat_Check(value)) return {nullptr, 0, PyFloat_AS_DOUBLE(value)};
  const PerSample from = {PyLong_AsVoidPtr(PyTuple_GET_ITEM(value, 0)), PyLong_AsLongLong(PyTuple_GET_ITEM(value, 1)),
                          1.0};
  need(from.data, "numbers per sample");
  return from;
}

// A field of a plan, by its type. What is None leaves the field as it is.
template <typename number_t>
std::enable_if_t<std::is_arithmetic_v<number_t>> read(const py::handle& value, number_t& out) {
  out = value.cast<number_t>();
}

inline void read(const py::handle& value, void*& out) { out = as_pointer(value.cast<uintptr_t>()); }
inline void read(const py::handle& value, const void*& out) { out = as_pointer(value.cast<uintptr_t>()); }

template <typename entry_t, size_t kCount>
void read(const py::handle& values, entry_t (&out)[kCount]) {
  const py::tuple from = values.cast<py::tuple>();
  if (from.size() != kCount) throw std::invalid_argument("a plan's tuple has the wrong length");
  for (size_t k = 0; k < kCount; ++k) read(from[k], out[k]);
}

// The batch's stride and those of the dims, which Python holds as one tuple.
inline void read_strides(const py::handle& strides, int64_t& batch_stride, int64_t (&stride)[kMaxDims]) {
  int64_t all[kMaxDims + 1];
  read(strides, all);
  batch_stride = all[0];
  std::memcpy(stride, all + 1, sizeof(stride));
}

inline void read(const py::handle& operand, Operand& out) {
  if (operand.is_none()) return;
  out.present = 1;
  read(operand["dtype"], out.dtype);
  read_strides(operand["strides"], out.batch_stride, out.stride);
}

// As many as there are.
template <size_t kMost>
void read(const py::handle& operands, Operand (&out)[kMost]) {
  const py::tuple from = operands.cast<py::tuple>();
  if (from.size() > kMost) throw std::invalid_argument("a plan has too many operands");
  for (size_t k = 0; k < from.size(); ++k) read(from[k], out[k]);
}

inline void read(const py::handle& map, Map& out) {
  if (map.is_none()) return;
  read(map["dtype"], out.dtype);
  read(map["mode"], out.mode);
  read_strides(map["strides"], out.batch_stride, out.stride);
  read(map["in_size"], out.in_size);
  read(map["in_stride"], out.in_stride);
}

}  // namespace diffdoctor
