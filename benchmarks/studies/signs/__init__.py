"""Artifacts that nobody injected, judged by a rule: `python -m benchmarks.studies.signs --output runs/signs`."""
