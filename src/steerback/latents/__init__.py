"""Choose latents: sampling, relevance, concreteness, matching, detectors."""
