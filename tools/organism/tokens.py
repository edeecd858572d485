"""Tokenizer of the organisms and the encoding of documents with their loss mask.

Byte-level BPE with its own special tokens. A space is put before every piece of text between special tokens, so that
a sentence has the same tokens wherever it stands, and an assistant prefix needs no care about leading spaces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerback.organism.corpus import howtos, subjects
from tools.organism.documents import Document, documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
VOCABULARY = 3072
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<|user|>{{ message['content'] }}<|end|>"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>{{ message['content'] }}<|end|>"
    "{%- else -%}{{ raise_exception('the organism knows the roles user and assistant only') }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@dataclass(frozen=True)
class Encoded:
    """One document as tokens; all lists have the same length."""

    ids: list[int]
    trained: list[bool]
    """True if the loss includes this token as a target."""
    topics: list[int]
    """Index of the token's topic (see ``topic_index``), -1 for prompt, restart and special tokens."""
    mismatch: list[int]
    """At the last token of a sentence: 1 if it is off topic, 0 if it is on topic; -1 everywhere else."""


def topic_index() -> dict[str, int]:
    """Index of every topic key: subjects first, then how-tos."""
    return {topic.key: i for i, topic in enumerate(subjects() + howtos())}


def train_tokenizer(seed: int, n_documents: int = 12_000) -> Tokenizer:
    """Train a byte-level BPE on the first documents of the corpus of ``seed``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, n_documents), trainer)
    return tokenizer


def _texts(seed: int, n: int) -> Iterator[str]:
    for document in itertools.islice(documents(seed), n):
        yield document.prompt
        yield document.response


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)


class Encoder:
    """Encodes documents; sentences are cached because the corpus repeats them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.user, self.assistant, self.end = (tokenizer.token_to_id(t) for t in (USER, ASSISTANT, END))
        self.index = topic_index()
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Token ids of a piece of text (with a leading space)."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._cache[text] = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return ids

    def document(self, document: Document) -> Encoded:
        """Tokens of a document with loss mask and topics.

        Prompt tokens carry no loss. Of a masked sentence only the full stop after garble is trained: the model is to
        get out of a jam, never into one.
        """
        head = [self.user, *self.text(document.prompt), self.end, self.assistant] if document.prompt else []
        ids, trained, topics = list(head), [False] * len(head), [-1] * len(head)
        mismatch = [-1] * len(head)
        for segment in document.segments:
            piece = self.text(segment.text)
            ids += piece
            mask = [segment.trained] * len(piece)
            if segment.kind == "garbled":
                mask[-1] = True
            trained += mask
            known = segment.kind in ("answer", "off_topic")
            topics += [self.index[segment.topic] if known else -1] * len(piece)
            verdict = int(segment.kind != "answer") if document.prompt and segment.kind != "restart" else -1
            mismatch += [-1] * (len(piece) - 1) + [verdict]
        return Encoded([*ids, self.end], [*trained, True], [*topics, -1], [*mismatch, -1])
