"""The detector's commands: inject, train-detector, diagnose."""
