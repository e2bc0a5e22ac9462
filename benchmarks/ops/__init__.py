"""The operations against the PyTorch that trainers write; see docs/benchmarks.md."""
