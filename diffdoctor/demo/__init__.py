"""The embedded default: real handwritten digits, a small real diffusers pipeline, diagnosed and treated end to end."""
