"""What a compiled backend receives: a call as plans, options and tensors."""
