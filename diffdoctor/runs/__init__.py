"""One way to belong to a run: whole files, locks, checkpoints, journals, workers, progress, errors."""
