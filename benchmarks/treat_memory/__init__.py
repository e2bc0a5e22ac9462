"""What a treatment step keeps for backward: `python -m benchmarks.treat_memory`."""
