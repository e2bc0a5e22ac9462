"""Every method on two trained pipelines: `python -m benchmarks.treatment --output runs/treatment`."""
