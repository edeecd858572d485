"""The organism's training corpus: sentences written for this project, and the code that composes documents."""

from steerback.organism.corpus.documents import (
    Document,
    DocumentSegment,
    answer_sentences,
    documents,
    make_document,
    passage,
    restart,
    restart_phrases,
    subject_sentences,
    with_metaprompt,
    without_restarts,
)
from steerback.organism.corpus.text import Topic, howtos, metaprompts, subjects, topic

__all__ = [
    "Document",
    "DocumentSegment",
    "Topic",
    "answer_sentences",
    "documents",
    "howtos",
    "make_document",
    "metaprompts",
    "passage",
    "restart",
    "restart_phrases",
    "subject_sentences",
    "subjects",
    "topic",
    "with_metaprompt",
    "without_restarts",
]
