"""Detector networks: what they share, the architectures, and loading one from a folder."""
