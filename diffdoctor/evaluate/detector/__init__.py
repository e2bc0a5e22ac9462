"""Evaluation of a detector on labelled pictures."""
