// The list of what Python sees: every file of csrc/bind adds its own functions to it, bindings.cpp walks it.
#pragma once

#include <pybind11/pybind11.h>

namespace diffdoctor {

namespace py = pybind11;

struct Binding {
  using Define = void (*)(py::module_&);

  explicit Binding(Define define) : define(define), next(first()) { first() = this; }
  Binding(const Binding&) = delete;

  static const Binding*& first() {
    static const Binding* binding = nullptr;
    return binding;
  }

  const Define define;
  const Binding* const next;
};

inline void define_bindings(py::module_& m) {
  for (const Binding* binding = Binding::first(); binding != nullptr; binding = binding->next) binding->define(m);
}

}  // namespace diffdoctor
