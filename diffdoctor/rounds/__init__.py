"""Rounds of labelling and training: `diffdoctor round`."""
