"""Measures of detectors and of treated models, and the report that shows them.

The modules are imported where they are used: `diffdoctor.measures.rates` needs numpy alone, `diffdoctor.evaluate.model`
needs the extra `stages`.
"""
