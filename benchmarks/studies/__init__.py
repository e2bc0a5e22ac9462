"""Studies of whole stages, each a program: `python -m benchmarks.studies.NAME`."""
