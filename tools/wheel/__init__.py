"""Wheels that install anywhere (`python -m tools.wheel`)."""
