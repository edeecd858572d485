"""Convert requests to tokens and tokens to text: chat templates, token roles (user's words, response) and stop strings.

This module does not know about models or steering.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from steerback.errors import SteerbackError, one_line, unknown
from steerback.records import FinishReason, Prefix, Request

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from steerback.engines.base import Over


@dataclass(frozen=True, slots=True)
class Conversation:
    """Tokens of a prompt with its response; `user` and `response` are positions without special and template tokens."""

    token_ids: tuple[int, ...]
    user: tuple[int, ...]
    response: tuple[int, ...]


STYLES = ("chat", "plain", "authors")
SECOND_HEADER = "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>"
"""Four tokens that the authors' code appends to Llama's chat prompt, although it already ends with an assistant header.

The last token is 128007, without the line break that normally follows.
"""
MARK = "\ue000"
"""Placeholder for the user's words in a template (a private-use character)."""
DATE = "26 Jul 2024"
"""Date in Llama's templates: the template's default instead of today's date, so that prompts do not change."""
BLOCK, CONTEXT = 16, 6
"""Tokens that are decoded together to find their ends, and tokens before them that are decoded with them."""
TEMPLATE_SECONDS = 5.0
"""Time limit for a chat template. Templates come with the model and may never end."""
_GROWS = re.compile(r"\*\*\s*\w+|\*\s*\d{5,}|\d{5,}\s*\*(?!\*)")
"""Matches a product that can fill the memory in one step, before a time limit can act."""
TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Exceptions, besides jinja's, that an expression in a template can raise."""


class Prompter:
    """Render and tokenise prompts for one tokenizer.

    `style` is "chat" (the tokenizer's template), "plain" (the unchanged prompt) or "authors" (Llama's template with the
    second header of the authors' prompts: malformed, kept for reproduction).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: str = "chat") -> None:
        if style not in STYLES:
            raise unknown("prompt_format", style, STYLES)
        if style != "plain" and not getattr(tokenizer, "chat_template", None):
            raise SteerbackError("the tokenizer has no chat template; give the target prompt_format = 'plain'")
        if style == "authors" and not set(re.findall(r"<\|\w+\|>", SECOND_HEADER)) <= set(tokenizer.get_vocab()):
            raise SteerbackError("prompt_format 'authors' doubles Llama 3's header, which this tokenizer does not know")
        if style != "plain" and (product := _GROWS.search(str(tokenizer.chat_template))):
            raise SteerbackError(f"the chat template is refused for {product[0]!r}, which can fill the memory")
        self.tokenizer, self.style = tokenizer, style
        self._tokens: dict[tuple[str, str, str | None], tuple[int, ...]] = {}
        self._heads: dict[str, str] = {}
        self._special = frozenset(tokenizer.all_special_ids)

    def render(self, prompt: str, system: str | None = None) -> str:
        """Return the text before the response; without a system role, the system text precedes the prompt."""
        if self.style == "plain":
            return f"{system}\n\n{prompt}" if system else prompt
        user = {"role": "user", "content": prompt}
        if not system:
            return self._template([user])
        text = self._template([{"role": "system", "content": system}, user], may_fail=True)
        if system.strip() not in text:  # Gemma refuses the system role, other templates drop it
            return self._template([{"role": "user", "content": f"{system}\n\n{prompt}"}])
        return text

    def tokens(self, prompt: str, prefill: str = "", system: str | None = None) -> tuple[int, ...]:
        """Return the token ids of prompt and prefill (assistant text that the model continues)."""
        key = (prompt, prefill, system)
        if key not in self._tokens:
            self._tokens[key] = tuple(self._encode(self.render(prompt, system) + prefill)["input_ids"])
        return self._tokens[key]

    def prompt(self, request: Request) -> tuple[int, ...]:
        """Return the token ids before a request's response: prompt, prefill and prefix."""
        before = self.tokens(request.prompt, request.prefill, request.system)
        return before if request.prefix is None else (*before, *request.prefix.token_ids)

    def conversation(self, prompt: str, response: str) -> Conversation:
        """Return a prompt with its response as tokens, with the positions of the user's words and of the response."""
        if prompt not in self._heads:  # cached: thousands of texts may share a prompt, and templates are slow
            self._heads[prompt] = self.render(prompt)
        head, special = self._heads[prompt], self._special
        encoded = self._encode(head + response, offsets=True)
        # The user's words are the characters that depend on the prompt. A search for the prompt would fail if the
        # template trims it, and it could match words of the template.
        before, after = self._around
        if not (head.startswith(before) and head.endswith(after)):
            raise SteerbackError(
                "the chat template writes this prompt in a changed form, so its words cannot be located"
            )
        first, last = len(before), len(head) - len(after)
        user: list[int] = []
        answer: list[int] = []
        for n, (token, (start, end)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            if token in special or start == end:
                continue
            if end > len(head):
                answer.append(n)
            elif end > first and start < last:
                user.append(n)
        return Conversation(tuple(encoded["input_ids"]), tuple(user), tuple(answer))

    def pooled(self, prompt: str, response: str, over: Over) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of a prompt with its response, and the positions to pool, in increasing order.

        For `all`, the text is the template's rendering of both messages, or of the prompt alone if there is no
        response. It has no generation header, as in the authors' code.
        """
        if over != "all":
            text = self.conversation(prompt, response)
            return text.token_ids, tuple(sorted((*text.user, *text.response) if over == "words" else text.response))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        plain = self.style == "plain"
        whole = prompt + response if plain else self._template(messages[: 2 if response else 1], asks=False)
        ids = tuple(self._encode(whole)["input_ids"])
        return ids, tuple(range(len(ids)))

    @cached_property
    def _around(self) -> tuple[str, str]:
        before, _, after = self.render(MARK).partition(MARK)
        return before, after

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def continuation(self, token_ids: Sequence[int], prefix: Prefix | None) -> str:
        """Return the text that tokens add to a prefix, because a token may be decoded differently at the start."""
        if prefix is None:
            return self.text(token_ids)
        return self.text([*prefix.token_ids, *token_ids])[len(prefix.text) :]

    def ends(self, token_ids: Sequence[int], length: int, prefix: Prefix | None = None) -> list[int]:
        """Return the character at which each token ends in the decoded text, cut to `length` characters."""
        before = list(prefix.token_ids) if prefix else []
        offset, ends, end = len(prefix.text) if prefix else 0, [], 0
        for text in self._growing([*before, *token_ids], len(before)):
            # An incomplete character decodes to U+FFFD; it counts from its last token on.
            end = max(end, len(text.rstrip("\ufffd")) - offset)
            ends.append(min(end, length))
        return ends

    def _growing(self, ids: list[int], kept: int) -> list[str]:
        """Return the text of ids[:n] for n in kept + 1 .. len(ids).

        A token is decoded after at most BLOCK + CONTEXT earlier ones, because decoding the whole text for each token
        takes quadratic time. If the last text is not that of all tokens, the whole texts are decoded.
        """
        texts, known, start, first = [self.text(ids[:kept])], 0, kept, max(kept - CONTEXT, 0)
        head = len(self.text(ids[first:kept]))
        for n in range(kept + 1, len(ids) + 1):
            texts.append(texts[known] + self.text(ids[first:n])[head:])
            if n - start >= BLOCK and not texts[-1].endswith("\ufffd"):
                known, start, first = n - kept, n, n - CONTEXT
                head = len(self.text(ids[first:n]))
        right = texts[-1] == self.text(ids)
        return texts[1:] if right else [self.text(ids[:n]) for n in range(kept + 1, len(ids) + 1)]

    def with_ends(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text of tokens, and the character at which each token ends."""
        text = self.text(token_ids)
        return text, self.ends(token_ids, len(text))

    def finish(
        self, token_ids: Sequence[int], request: Request, ends: Collection[int], checked: int
    ) -> tuple[int, str, FinishReason] | None:
        """Return (kept tokens, text, reason) of a finished response, or None.

        The first `checked` tokens were checked earlier. The token that ends the response is kept, and a stop string is
        removed from the text only, so the number of tokens is always the number that the model generated.
        """
        limit, stops = request.sampling.max_new_tokens, request.sampling.stop
        end = next((n + 1 for n in range(checked, min(len(token_ids), limit)) if token_ids[n] in ends), None)
        upto = end or min(len(token_ids), limit)
        # Decode token by token only if a stop string occurs at all, because decoding is slow.
        for n in range(checked + 1, upto + 1) if stops and self._stops(token_ids[:upto], request) else ():
            if at := self._stops(token_ids[:n], request):
                return n, at[0], "stop"
        reason: Literal["stop", "length"] = "stop" if end else "length"
        text = self.continuation(token_ids[:upto], request.prefix) if end or upto == limit else ""
        return (upto, text, reason) if end or upto == limit else None

    def _stops(self, token_ids: Sequence[int], request: Request) -> tuple[str] | None:
        """Return a tuple with the text before the first stop string, or None."""
        text = self.continuation(token_ids, request.prefix)
        starts = [at for at in (text.find(stop) for stop in request.sampling.stop) if at >= 0]
        return (text[: min(starts)],) if starts else None

    def _template(self, messages: list[dict[str, str]], may_fail: bool = False, asks: bool = True) -> str:
        """Return the messages as rendered by the template, with a generation header if `asks` is true."""
        from jinja2 import TemplateError

        try:
            with _time_limit(TEMPLATE_SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks, date_string=DATE
                )
            return text + SECOND_HEADER if self.style == "authors" and asks and text else text
        except (TemplateError, TimeoutError, *TEMPLATE_ERRORS) as error:
            if may_fail:
                return ""
            raise SteerbackError(f"the chat template refuses this prompt: {one_line(error)}") from error

    def _encode(self, text: str, offsets: bool = False) -> BatchEncoding:
        # Chat templates contain the beginning-of-text token; for plain text the tokenizer adds it.
        return self.tokenizer(text, add_special_tokens=self.style == "plain", return_offsets_mapping=offsets)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the templates of this thread run longer than `seconds`.

    Jinja compiles a template to Python, so a trace function sees each line. This works in every thread.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def check(frame: FrameType, _event: str, _value: object) -> TraceFunction | None:
        if time.monotonic() > end:
            raise TimeoutError(f"it did not end within {seconds:g} seconds")
        return check if frame.f_code.co_filename == "<template>" else None

    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
