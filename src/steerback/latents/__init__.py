"""Choosing latents: sampling, relevance, concreteness, matching, detectors."""
