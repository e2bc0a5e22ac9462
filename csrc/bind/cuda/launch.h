// Launches of csrc/cuda from Python: a workspace and a stream as integers, a launch's error as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/arguments.h"

namespace diffdoctor {

// launch() without the GIL. Raises RuntimeError with what it returns, if that is an error.
template <typename launch_t>
void launch_released(const char* op, launch_t launch) {
  const char* error;
  {
    py::gil_scoped_release nogil;
    error = launch();
  }
  if (error != nullptr) throw std::runtime_error(std::string("diffdoctor: CUDA could not launch ") + op + ": " + error);
}

}  // namespace diffdoctor
