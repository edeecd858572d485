"""Experiment 4's training: examples of self-correction, their segments, mixes of them, and LoRA adapters.

`segments` says which text is trained, `synthesize` and `writer` make examples, `mixes` puts them together, `train` fits
adapters, `adapters` finds and describes them, `axolotl` writes the same for axolotl. Knows nothing of experiments.
"""
