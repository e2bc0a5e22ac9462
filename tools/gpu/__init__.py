"""All GPU work in one command (`python -m tools.gpu`), and what compilers made of the GPU kernels."""
