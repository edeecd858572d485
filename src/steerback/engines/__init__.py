"""Engines turn requests into completions. `base` is the protocol, `transformers` the reference."""
