"""Tools for those who develop diffdoctor."""
