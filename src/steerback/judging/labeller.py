"""Labels of latents by a language model, from the snippets in which they are most active.

Each label is asked for once per model, rubric and snippets; what has been answered is kept line by line, so that a
stopped or unpaid-for labelling goes on where it was. Knows snippets and replies, nothing of latents or targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steerback.judging.parse import parse_verdict
from steerback.judging.prompt import LABEL, Asked, enclose, encodable, rubric
from steerback.judging.transport import Transport
from steerback.records import Spend, digest
from steerback.store.files import make_folder

LONGEST = 120


@dataclass
class Labelled:
    """Labels by key; `nothing` in common was found for so many, and `failed` says why others have none."""

    labels: dict[int, str] = field(default_factory=dict)
    nothing: int = 0
    failed: dict[str, int] = field(default_factory=dict)


class LLMLabeller:
    """`store` is a file of JSON lines, None keeps nothing."""

    version = LABEL

    def __init__(self, transport: Transport, store: Path | None = None) -> None:
        self.transport, self._store = transport, store

    def estimate(self, snippets: Mapping[int, Sequence[str]]) -> Spend:
        """What labelling would take beyond what is known already."""
        known = self._read()
        return self.transport.estimate((_ask(s) for s in snippets.values() if self._key(s) not in known), 40)

    async def label(self, snippets: Mapping[int, Sequence[str]]) -> Labelled:
        """One label per key from its snippets, strongest first."""
        known, found = self._read(), Labelled()
        asked = {str(k): _ask(s) for k, s in snippets.items() if self._key(s) not in known}
        async for place, reply in self.transport.ask(asked.items()):
            answer = _answer(reply.text, asked[place].nonce) if not reply.reason else reply.reason
            if isinstance(answer, str):
                found.failed[answer] = found.failed.get(answer, 0) + 1
                continue
            key = self._key(snippets[int(place)])
            known[key] = answer[0]
            self._keep(key, answer[0])
        for k, s in snippets.items():
            label = known.get(self._key(s))
            if label is not None:
                found.labels[k] = label
            elif self._key(s) in known:
                found.nothing += 1
        return found

    def _key(self, snippets: Sequence[str]) -> str:
        return digest([self.transport.model, rubric(self.version).system, list(snippets)])

    def _read(self) -> dict[str, str | None]:
        if self._store is None or not self._store.is_file():
            return {}
        known: dict[str, str | None] = {}
        for line in self._store.read_text(encoding="utf-8").split("\n"):
            if line.endswith("}"):  # the last line of a killed process may be a part of one
                row = json.loads(line)
                known[row["key"]] = row["label"]
        return known

    def _keep(self, key: str, label: str | None) -> None:
        if self._store is None:
            return
        make_folder(self._store.parent)
        with self._store.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, "label": label}))


def _ask(snippets: Sequence[str]) -> Asked:
    listed = "\n".join(f"{n}. {' '.join(encodable(s).split())}" for n, s in enumerate(snippets, 1))
    return enclose(rubric(LABEL), "snippets", listed)


def _answer(reply: str, nonce: str) -> tuple[str | None] | str:
    """The label or None (nothing in common), wrapped; or the reason why the reply says neither."""
    verdict = parse_verdict(reply, nonce)
    if isinstance(verdict, str):
        return verdict
    label = verdict.get("label", 0)
    if label is None:
        return (None,)
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST:
        return f"the judge's label is not a text of at most {LONGEST} characters"
    return (" ".join(label.split()),)
