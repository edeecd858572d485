"""Prompt formats: the tokenizer's template, no system role, Llama's double header, a fixed date."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest

import tiny
from steerback.engines import prompting
from steerback.engines.prompting import Prompter
from steerback.errors import SteerbackError

HEAD = "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
LLAMA = (
    "{{ '<|begin_of_text|>' }}{{ 'Today: ' + (date_string if date_string is defined else strftime_now('%d %b %Y')) }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ '<bos>' }}"
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tokenizer(template: str) -> Any:
    made = copy.deepcopy(tiny.tokenizer())
    made.chat_template = template
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>"]
    made.add_special_tokens({"additional_special_tokens": words if template == LLAMA else words[4:]})
    return made


def test_llama_is_told_the_templates_own_date() -> None:
    asked = Prompter(tokenizer(LLAMA)).render("Explain tides.", system="Be short.")
    assert asked == (
        "<|begin_of_text|>Today: 26 Jul 2024"
        + HEAD.format(role="system", text="Be short.")
        + HEAD.format(role="user", text="Explain tides.")
        + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_authors_header_is_doubled_and_nothing_else() -> None:
    plain, doubled = Prompter(tokenizer(LLAMA)), Prompter(tokenizer(LLAMA), "authors")
    second = "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>"
    for system in (None, "Be short."):
        assert doubled.render("Hi", system) == plain.render("Hi", system) + second
    assert len(doubled.tokens("Hi")) == len(plain.tokens("Hi")) + len(
        plain.tokenizer(second, add_special_tokens=False)["input_ids"]
    )
    end = plain.tokenizer.convert_tokens_to_ids("<|end_header_id|>")  # 128007 in Llama 3's own vocabulary
    assert doubled.tokens("Hi")[-1] == end != plain.tokens("Hi")[-1]
    turns = [HEAD.format(role="user", text="the cat"), HEAD.format(role="assistant", text="a stone")]
    for reply, wanted in (("", turns[0]), ("a stone", "".join(turns))):  # what is read has no header that asks
        ids, chosen = doubled.pooled("the cat", reply, "all")
        assert plain.tokenizer.decode(list(ids)) == f"<|begin_of_text|>Today: 26 Jul 2024{wanted}"
        assert chosen == tuple(range(len(ids)))
    spoken = doubled.conversation("the cat", "a stone")
    said = plain.tokenizer.decode([spoken.token_ids[n] for n in spoken.response])
    assert said == "a stone"  # headers are no one's words
    assert plain.tokenizer.decode([spoken.token_ids[n] for n in spoken.user]) == "the cat"


def test_the_authors_format_is_llamas_alone() -> None:
    with pytest.raises(SteerbackError, match="doubles Llama 3's header, which this tokenizer does not know"):
        Prompter(tokenizer(GEMMA), "authors")
    with pytest.raises(SteerbackError, match="unknown prompt_format 'author'; did you mean authors"):
        Prompter(tokenizer(LLAMA), "author")


def test_gemma_has_no_system_role() -> None:
    prompter = Prompter(tokenizer(GEMMA))
    asked = "<bos><start_of_turn>user\nBe short.\n\nExplain tides.<end_of_turn>\n<start_of_turn>model\n"
    assert prompter.render("Explain tides.", system="Be short.") == asked
    assert (
        prompter.tokens("Explain tides.", system="Be short.").count(prompter.tokenizer.convert_tokens_to_ids("<bos>"))
        == 1
    )  # the template brings it; the tokenizer adds no second one


@pytest.mark.parametrize("prompt", ["the cat", " the cat\n", "user", "assistant", "model", "a"])
@pytest.mark.parametrize("template", [LLAMA, GEMMA, GEMMA.replace("m.content", "(m.content | trim)")])
def test_the_users_words_are_found_whatever_they_are(template: str, prompt: str) -> None:
    """Also where the template trims them, and where they are words of the template itself."""
    prompter = Prompter(tokenizer(template))
    spoken = prompter.conversation(prompt, "a stone")
    said = prompter.tokenizer.decode([spoken.token_ids[n] for n in spoken.user])
    assert said.strip() == prompt.strip()
    head = len(prompter.tokens(prompt))
    assert max(spoken.user) < head - 1  # the header of the response follows
    assert min(spoken.response) >= head


def test_a_template_that_writes_prompts_in_other_forms_is_refused() -> None:
    """Positions of the user's words could not be told."""
    odd = Prompter(tokenizer(GEMMA.replace("m.content", "(m.content | length | string) + m.content")))
    with pytest.raises(SteerbackError, match="writes this prompt in a changed form"):
        odd.conversation("the cat", "a stone")


@pytest.mark.parametrize("template", ["{{ 'x' * 10000000000 }}", "{{ 99999999*m }}", "{{ 'x' * 10 ** 10 }}"])
def test_a_template_that_would_fill_the_memory_is_refused(template: str) -> None:
    with pytest.raises(SteerbackError, match="can fill the memory"):
        Prompter(tokenizer(template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('\x1b[31mred\nalert') }}", r"\\x1b\[31mred alert"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages.nothing.content }}", "no attribute"),
        ("{{ messages + 1 }}", "concatenate"),
        ("{{ range(1000000000) }}", "too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "did not end within 0.3 seconds",
        ),
    ],
)
def test_a_template_that_fails_or_loops_is_one_line(template: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates come with the model: control characters are shown, not obeyed, and none runs for ever."""
    monkeypatch.setattr(prompting, "TEMPLATE_SECONDS", 0.3)
    trace = sys.gettrace()
    for system in (None, "Be short."):
        with pytest.raises(SteerbackError, match="the chat template refuses this prompt: .*" + words) as caught:
            Prompter(tokenizer(template)).render("Hi", system)
        assert str(caught.value).isprintable()
    assert sys.gettrace() is trace
