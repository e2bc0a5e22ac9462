"""Measures: numbers from maps, masks, flags and features; nothing here draws, reads files or knows a network."""
