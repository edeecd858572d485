"""The organism's training corpus: sentences written for this project. `tools/organism` composes documents of them."""

from steerback.organism.corpus.text import Topic, howtos, metaprompts, passage, restart_phrases, subjects, topic

__all__ = ["Topic", "howtos", "metaprompts", "passage", "restart_phrases", "subjects", "topic"]
