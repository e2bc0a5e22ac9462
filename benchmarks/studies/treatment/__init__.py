"""Every method on two trained pipelines: `python -m benchmarks.studies.treatment --output runs/treatment`."""
