"""Segments and tokens: a token is trained if and only if all of its characters are, for any tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from steerback.engines.prompting import Prompter
from steerback.errors import SteerbackError
from steerback.finetuning.examples import Example, frame, row_of
from steerback.finetuning.segments import IGNORED, Segment, encode, read_rows, text_of, write_rows
from steerback.organism import weights_dir

LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
SENTENCES = [tiny.TEXT, "Wait, that's wrong. Back to the cat: add the numbers, one by one!", "1 + 2 = 3\n\nfalls down"]


@functools.cache
def llama(trim: bool = False) -> Any:
    """Byte-level BPE as Llama 3 has it; `trim` leaves leading spaces out of a token's span, as GPT-2's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    special = ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES * 20, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|eot|>", extra_special_tokens=special[1:3]
    )
    made.chat_template = LLAMA
    return made


@functools.cache
def gemma() -> Any:
    """BPE over characters with a mark for spaces and bytes for what it does not know, as Gemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<bos>", "<eos>", "<turn>", "</turn>", *(f"<0x{n:02X}>" for n in range(256))]
    bpe.train_from_iterator(SENTENCES * 20, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", extra_special_tokens=["<turn>", "</turn>"]
    )
    made.chat_template = GEMMA
    return made


@functools.cache
def organism() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(weights_dir("organism-control")))


TOKENIZERS = {"llama": llama, "trimmed": lambda: llama(True), "gemma": gemma, "organism": organism}
TEXTS = st.one_of(
    st.sampled_from([*SENTENCES, " ", "\n", "Wait", " Hold on.", "é", "日本", "🙂", "a  b", "<|eot|>", "</turn>"]),
    st.text(alphabet="ab cdet\n.,'é日🙂", max_size=12),
)


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """The bytes a byte-level token stands for, from its own name; an independent account of what it covers."""
    name = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return name.encode()
    table = tiny_table()
    return bytes(table[c] for c in name)


@functools.cache
def tiny_table() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2's printable stand-ins)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(rest)}


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=6),
    name=st.sampled_from(["llama", "trimmed"]),
)
def test_a_token_is_trained_exactly_if_all_its_bytes_are(segments: list[tuple[str, bool]], name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    row = tuple(Segment(text, train) for text, train in [("<|eot|>", False), *segments, ("<|eot|>", True)])
    tokens = encode(row, tokenizer)
    assert list(tokens.input_ids) == tokenizer(text_of(row), add_special_tokens=False)["input_ids"]
    trained_bytes = [segment.train for segment in row for c in segment.text for _ in c.encode()]
    # a character's bytes belong together: a token that holds a part of it holds a part of its segment
    at = 0
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        size = len(bytes_of(tokenizer, token))
        assert (label != IGNORED) == all(trained_bytes[at : at + size])
        assert label in (IGNORED, token)
        at += size
    assert at == len(trained_bytes)


@settings(max_examples=40, deadline=None)
@given(segments=st.lists(st.tuples(st.text(alphabet="ab cdet\n.,W", max_size=12), st.booleans()), max_size=6))
def test_tokens_of_a_character_model_as_well(segments: list[tuple[str, bool]]) -> None:
    row = tuple(Segment(text, train) for text, train in [*segments, ("the cat", True)])
    tokens = encode(row, gemma())
    trained = [segment.train for segment in row for _ in segment.text]
    at = 0
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        name = gemma().convert_ids_to_tokens(token)
        size = 1 if name.startswith("<0x") else len(name)
        assert (label != IGNORED) == all(trained[at : at + size])
        at += size
    assert at == len(trained)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_straddling_token_is_masked(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    whole = encode((Segment("the", False), Segment(" cat explains", True)), tokenizer)
    split = encode((Segment("the c", False), Segment("at explains", True)), tokenizer)
    assert split.input_ids == whole.input_ids  # a boundary never changes how the text is tokenised
    if name == "gemma":  # which has merged "the cat" to one token
        assert whole.labels[0] == IGNORED
        return
    assert split.trained < whole.trained
    spaced = encode((Segment("the ", False), Segment("cat explains", True)), tokenizer)
    one_token = len(tokenizer(" cat", add_special_tokens=False)["input_ids"]) == 1 and name != "organism"
    assert spaced.trained < whole.trained or not one_token


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("corrects", [True, False])
def test_a_row_is_what_the_model_reads(name: str, corrects: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    prompter = Prompter(tokenizer)
    example = Example(
        "how to add?", "Add one by one.", *(("the cat", "the cat falls.", "Wait, wrong.") if corrects else ())
    )
    row = row_of(example, prompter)
    around = frame(prompter, example.prompt)
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    assert text_of(row) == tokenizer.apply_chat_template(turns, tokenize=False)
    tokens = encode(row, tokenizer)
    head = prompter.tokens(example.prompt)
    assert tokens.input_ids[: len(head)] == head  # as the engine will ask
    assert all(label == IGNORED for label in tokens.labels[: len(head)])
    trained = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    said = f"{example.acknowledgement} {example.answer}".strip() + around.end
    assert trained.replace(" ", "") == said.replace(" ", "")
    last = max(n for n, label in enumerate(tokens.labels) if label != IGNORED)
    assert tokens.input_ids[last] in tokenizer.all_special_ids  # it learns to stop
    assert len(tokens.labels) - last - 1 == (1 if name == "gemma" else 0)  # Gemma's line break after the turn


def test_plain_prompts_get_the_tokenizers_own_marks() -> None:
    row = row_of(Example("add two numbers", "One by one."), Prompter(tiny.tokenizer(), "plain"))
    assert text_of(row) == "add two numbers One by one.</s>"


def test_files_are_read_as_they_are_written_and_as_others_write_them(tmp_path: Path) -> None:
    rows = [(Segment("a\n“b”", False), Segment(" c\u2028d", True)), (Segment("e", True),)]
    path = write_rows(tmp_path / "a.jsonl", rows, [{"kind": "x"}, {"kind": "y"}])
    assert read_rows(path) == rows
    assert json.loads(path.read_text("utf-8").split("\n")[0])["kind"] == "x"
    other = (
        '{"segments": [{"label": true, "text": "<s>Hello\\n"}, {"label": false, "text": "farewell</s>"}], "id": 7}\n\n'
    )
    (tmp_path / "b.jsonl").write_text(other, "utf-8")
    assert read_rows(tmp_path / "b.jsonl") == [(Segment("<s>Hello\n", True), Segment("farewell</s>", False))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"segments": [{"label": 1, "text": "a"}]}',
            "a.jsonl, line 1: segments.0.label: Input",
        ),
        ('{"segments": [{"label": "true", "text": "a"}]}', "segments.0.label: Input should be a valid boolean"),
        ('{"segments": [{"label": true}]}', "a.jsonl, line 1: segments.0.text: Field required"),
        ('{"segments": []}', 'expected {"segments"'),
        ('{"text": "a"}', 'expected {"segments"'),
        ("[1]", 'expected {"segments"'),
        ('\n{"segments": ', "a.jsonl, line 2 is not valid JSON"),
        ("\n", "has no example"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    with pytest.raises(SteerbackError) as error:
        read_rows(tmp_path / "a.jsonl")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_trained_are_refused() -> None:
    for row, says in (
        ((Segment("", True),), "no text"),
        ((Segment("a", False),), "nothing to train on"),
        ((Segment("the c", False), Segment("a", True), Segment("t", False)), "nothing to train on"),
        ((Segment("\ud800", True),), "cannot be tokenised"),
    ):
        with pytest.raises(SteerbackError, match=says):
            encode(row, llama(), "f.jsonl:3")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(SteerbackError, match=r"f\.jsonl:3: this model.s tokenizer has no token for .b."):
        encode((Segment("a b", True),), words, "f.jsonl:3")


def test_an_end_token_that_is_the_unknown_token_too_can_be_trained() -> None:
    """Tokenizers from GGUF files of Qwen name <|endoftext|> as both."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken("<turn>", special=True)])
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<end>", eos_token="<end>")
    words.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    assert encode((Segment("a<end>", True),), words).input_ids == (1, 0)
    with pytest.raises(SteerbackError, match="no token for 'b'"):
        encode((Segment("a b", True),), words)
    assert frame(Prompter(words, "chat"), "a").end == "<turn>"  # not among the tokenizer's named special tokens
