"""Judges split responses into attempts and score them; `base` is the protocol."""
