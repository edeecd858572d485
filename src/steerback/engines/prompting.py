"""From a request to tokens and back: chat templates, which tokens are the user's words or the response, stop strings.

Knows nothing of models or steering.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from steerback.errors import SteerbackError, unknown
from steerback.records import FinishReason


@dataclass(frozen=True, slots=True)
class Spoken:
    """A conversation in tokens, with the positions that are words of its speakers (no special or template tokens)."""

    token_ids: tuple[int, ...]
    user: tuple[int, ...]
    response: tuple[int, ...]


STYLES = ("chat", "plain", "authors")
SECOND_HEADER = "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""What the authors' code appends to Llama's chat prompt, which ends in an assistant header already."""
MARK = "\ue000"
"""Stands for a user's words in a template; a character for private use."""
DATE = "26 Jul 2024"
"""The date that Llama's templates tell the model: their own default, never the day of the run."""


class Prompter:
    """Renders and tokenises for one tokenizer.

    `style` is "chat" (the tokenizer's template), "plain" (the prompt as it is) or "authors" (Llama's template with the
    second header that the authors' prompts had: malformed, and kept for reproduction).
    """

    def __init__(self, tokenizer: Any, style: str = "chat") -> None:
        if style not in STYLES:
            raise unknown("prompt_format", style, STYLES)
        if style != "plain" and not getattr(tokenizer, "chat_template", None):
            raise SteerbackError("the tokenizer has no chat template; give the target prompt_format = 'plain'")
        if style == "authors" and _lacks(tokenizer, SECOND_HEADER):
            raise SteerbackError("prompt_format 'authors' doubles Llama 3's header, which this tokenizer does not know")
        self.tokenizer, self.style = tokenizer, style
        self._tokens: dict[tuple[str, str, str | None], tuple[int, ...]] = {}

    def render(self, prompt: str, system: str | None = None) -> str:
        """The text before the response. Templates without a system role get it as the first lines of the prompt."""
        if self.style == "plain":
            return f"{system}\n\n{prompt}" if system else prompt
        user = {"role": "user", "content": prompt}
        if not system:
            return self._template([user])
        text = self._template([{"role": "system", "content": system}, user], may_fail=True)
        if system.strip() not in text:  # Gemma refuses the role, others drop it
            return self._template([{"role": "user", "content": f"{system}\n\n{prompt}"}])
        return text

    def tokens(self, prompt: str, prefill: str = "", system: str | None = None) -> tuple[int, ...]:
        """Token ids of prompt and prefill (assistant text that the model goes on from)."""
        key = (prompt, prefill, system)
        if key not in self._tokens:
            self._tokens[key] = tuple(self._encode(self.render(prompt, system) + prefill)["input_ids"])
        return self._tokens[key]

    def spoken(self, prompt: str, response: str) -> Spoken:
        """A prompt with its response, saying which tokens are the user's words and which the response."""
        head = self.render(prompt)
        encoded = self._encode(head + response, return_offsets_mapping=True)
        special = set(self.tokenizer.all_special_ids)
        first, last = self._words(head)
        user: list[int] = []
        said: list[int] = []
        for n, (token, (start, end)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            if token in special or start == end:
                continue
            if end > len(head):
                said.append(n)
            elif end > first and start < last:
                user.append(n)
        return Spoken(tuple(encoded["input_ids"]), tuple(user), tuple(said))

    def _words(self, head: str) -> tuple[int, int]:
        """First character and last + 1 of the user's words in a rendered prompt: what another prompt replaces.

        Looking for the prompt itself would miss one that the template trims, and take a word of the template for it.
        """
        before, after = self._around
        if not (head.startswith(before) and head.endswith(after)):
            raise SteerbackError("the chat template writes this prompt in another form; its words cannot be told")
        return len(before), len(head) - len(after)

    @cached_property
    def _around(self) -> tuple[str, str]:
        before, _, after = self.render(MARK).partition(MARK)
        return before, after

    def text(self, token_ids: Sequence[int]) -> str:
        """What was said, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def ends(self, token_ids: Sequence[int], length: int) -> list[int]:
        """Character at which each token ends in the decoded text, of which the first `length` were kept."""
        found, end = [], 0
        for n in range(1, len(token_ids) + 1):
            end = max(end, len(self.text(token_ids[:n]).rstrip("\ufffd")))
            found.append(min(end, length))
        return found

    def finish(
        self, token_ids: Sequence[int], limit: int, ends: Collection[int], stops: Sequence[str], checked: int
    ) -> tuple[int, str, FinishReason] | None:
        """Whether a response has come to its end: (tokens it keeps, text, reason), or None while it goes on.

        The first `checked` tokens were looked at before. The token that ends it is kept, a stop string is cut off the
        text; so the number of tokens is always what the model was asked for.
        """
        end = next((n + 1 for n in range(checked, min(len(token_ids), limit)) if token_ids[n] in ends), None)
        upto = end or min(len(token_ids), limit)
        for n in range(checked + 1, upto + 1) if stops and self._stops(token_ids[:upto], stops) else ():
            if at := self._stops(token_ids[:n], stops):
                return n, at[0], "stop"
        reason: Literal["stop", "length"] = "stop" if end else "length"
        return (upto, self.text(token_ids[:upto]), reason) if end or upto == limit else None

    def _stops(self, token_ids: Sequence[int], stops: Sequence[str]) -> tuple[str] | None:
        """The text before the first stop string in it, wrapped, or None."""
        text = self.text(token_ids)
        found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        return (text[: min(found)],) if found else None

    def _template(self, messages: list[dict[str, str]], may_fail: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, date_string=DATE
                )
            )
            return text + SECOND_HEADER if self.style == "authors" and text else text
        except TemplateError as error:
            if may_fail:
                return ""
            raise SteerbackError(f"the chat template refuses this prompt: {error}") from error

    def _encode(self, text: str, **options: Any) -> Any:
        # A template brings its own beginning-of-text token; plain text gets the tokenizer's.
        return self.tokenizer(text, add_special_tokens=self.style == "plain", **options)


def _lacks(tokenizer: Any, text: str) -> bool:
    """Whether a special token in a text is none to this tokenizer."""
    known = tokenizer.get_vocab()
    return any(token not in known for token in re.findall(r"<\|\w+\|>", text))
