"""The CUDA C++ backend."""
