"""What a treatment step keeps for backward: `python -m benchmarks.studies.treat_memory`."""
