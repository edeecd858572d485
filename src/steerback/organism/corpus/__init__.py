"""The organism's training corpus: sentences written for this project, and the code that composes documents."""

from steerback.organism.corpus.documents import (
    Document,
    DocumentSegment,
    documents,
    make_document,
    passage,
    restart,
    restart_phrases,
    sentences_of,
    with_metaprompt,
    without_restarts,
)
from steerback.organism.corpus.text import Topic, howtos, metaprompts, subjects, topic

__all__ = [
    "Document",
    "DocumentSegment",
    "Topic",
    "documents",
    "howtos",
    "make_document",
    "metaprompts",
    "passage",
    "restart",
    "restart_phrases",
    "sentences_of",
    "subjects",
    "topic",
    "with_metaprompt",
    "without_restarts",
]
