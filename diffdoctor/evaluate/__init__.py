"""Evaluation of detectors and of treated models, with reports; needs the extra `stages`."""
