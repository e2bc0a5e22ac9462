"""Measures of detectors and of treated models, and the report that shows them.

They need the extra `stages`.
"""
