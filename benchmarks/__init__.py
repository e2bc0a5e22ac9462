"""Benchmarks of diffdoctor: its operations (ops), whole stages (studies), and the rows measured so far (results)."""
