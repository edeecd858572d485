"""Training for Experiment 4: examples of self-correction, mixes of them with normal answers, and LoRA adapters.

`synthesize` and `writer` make examples, `segments` marks the text to train on, `mixes` combines examples, `train` fits
adapters, `adapters` lists and describes them, `axolotl` exports the training. This package knows no experiments.
"""
