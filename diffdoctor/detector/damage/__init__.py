"""Injected damage: kinds, regions, exact masks and benign look-alikes."""
