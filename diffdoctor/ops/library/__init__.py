"""The operators that are registered with torch.library, behind torch.compile: one file per op."""
