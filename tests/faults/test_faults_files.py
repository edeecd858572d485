"""Damaged files of every format: each is read as what it says or refused in one line, and nothing hangs.

The mutations are drawn by hypothesis from a fixed seed. STEERBACK_FAULTS times as many are tried in the long form.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import SCALE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_runs import scripted_job

import tiny
from steerback.api import load_target
from steerback.config import build_config
from steerback.data.prompts import load_prompts
from steerback.engines.adapters import check_fits
from steerback.errors import SteerbackError
from steerback.finetuning.segments import read_rows
from steerback.jobs import execute
from steerback.judging.models import read_dotenv
from steerback.judging.user_rubric import read_rubric
from steerback.latents.sampling import parse_latents
from steerback.published.sources import read_source
from steerback.report.labelling import read_labels
from steerback.store.ledger import Ledger
from steerback.targets.directions import read_vector
from steerback.targets.labels import read_contexts, read_dead, read_label_file
from steerback.targets.registry import read_targets
from steerback.targets.sae import save_native
from steerback.targets.sae_files import load_sae
from steerback.targets.target import SaeSource

EACH = 2 * SCALE
"""Damaged files of each format."""
PATIENCE = 20
HOSTILE = (
    *(b"[" * 100_000, b"{" * 300, b'{"a":' * 5_000, b"1" * 5_000, b"-1", b"0", b"1e999", b"NaN", b"99999999999999"),
    *(b"\0", b"\xff\xfe", b"\\ud800", b"\xed\xa0\x80", b"\x1b[31m", b"\xef\xbb\xbf", b"\r", b'"', b"'", b"null", b"[]"),
    *(b"{}", b"true", b"&a [*a]", b"!!python/object:os.system x", b"a" * 70_000, b"../../../x", b"\n\n", b"${HOME}"),
)


def mutated(content: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """Return a content after some changes, each (kind, place, other place, bytes); places are shares of its length."""
    for kind, first, second, put in changes:
        a, b = sorted((int(first * len(content)), int(second * len(content))))
        if kind == "cut":
            content = content[:a]
        elif kind == "insert":
            content = content[:a] + put + content[a:]
        elif kind == "replace":
            content = content[:a] + put + content[a + len(put) :]
        elif kind == "drop":
            content = content[:a] + content[min(b, a + 200) :]
        elif kind == "double":
            content = content[:b] + content[a:b][:5_000] + content[b:]
        elif kind == "flip" and content:
            at = min(a, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ (1 << int(second * 7))]) + content[at + 1 :]
        elif kind == "value":  # another value for a number, a word or a text
            places = list(re.finditer(rb'-?\d+(?:\.\d+)?|"[^"\n]{0,40}"|\btrue\b|\bnull\b', content[:20_000]))
            if places:
                at = places[int(first * (len(places) - 1))]
                content = content[: at.start()] + put + content[at.end() :]
    return content


def in_header(content: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """Change the header of a safetensors file and say its new length, so that the change itself is met."""
    size = int.from_bytes(content[:8], "little")
    header = mutated(content[8 : 8 + size], changes)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


share = st.floats(0, 1, allow_nan=False)
changes = st.lists(
    st.tuples(
        st.sampled_from(["cut", "insert", "replace", "drop", "double", "flip", "value", "value", "value"]),
        share,
        share,
        st.sampled_from(HOSTILE) | st.binary(max_size=6),
    ),
    min_size=1,
    max_size=3,
)


def state_dict() -> bytes:
    out, w = io.BytesIO(), tiny.sae("relu")
    linear = {"encoder_linear.weight": w.W_enc.T, "encoder_linear.bias": w.b_enc}
    linear |= {"decoder_linear.weight": w.W_dec.T, "decoder_linear.bias": w.b_dec}
    torch.save({name: tensor.contiguous() for name, tensor in linear.items()}, out)
    return out.getvalue()


def archive() -> bytes:
    out, w = io.BytesIO(), tiny.sae("jumprelu")
    np.savez(out, **{n: getattr(w, n).numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")})
    return out.getvalue()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.ones(64, np.float32))
    return out.getvalue()


def lora() -> bytes:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    high, wide = tiny.model().get_decoder().layers[0].self_attn.q_proj.weight.shape
    return save({f"{name}A.weight": torch.ones(2, wide), f"{name}B.weight": torch.ones(high, 2)})


AUTHORS = json.dumps(
    {
        "experiment_config": {"model_name": "meta-llama/Llama-3.1-8B", "judge_model_name": "j", "n_trials": 2},
        "results_by_feature": [
            {
                "feature_index_in_sae": 7,
                "feature_label": "cats",
                "trials": [{"prompt": "a?", "response": "b c d", "score": {"attempts": [{"score": 5}]}, "seed": 1}],
            }
        ],
    }
).encode()
TARGETS = b'[mine]\nmodel = "builtin"\nsteer_layer = 2\nsae = {location = "x", format = "saelens", layer = 2}\n'
CONFIG = b"preset: quick\nn_latents: 3\nsampling: {temperature: 0.6}\nlimit: 4\nselection: {concreteness: off}\n"
LABELS = b"index,label,source\n3,cats,me\n5,'=cmd(),me\n"
LINES = b'{"index": "3", "description": "cats"}\n{"index": 5, "description": "x", "modelId": "m", "layer": "l"}\n'
SHEET = b"sample,response,position,prompt,topic,sentence,restart,score\na1,1,0,p,t,s,,50\na1,1,9,,,s,x,70\n"
ADAPTER = b'{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}'
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
RUBRIC = b"Score.\n{prompt}\n{response}\n{label}\n{format}\n"


@cache
def ledger() -> bytes:
    """A ledger with the trials and facts of a small run."""
    with tempfile.TemporaryDirectory() as place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(execute, "analyse", lambda *_: None)
            execute.run(scripted_job(), Path(place) / "run")
        with sqlite3.connect(Path(place) / "run" / "ledger.sqlite") as db:
            db.execute("PRAGMA journal_mode = DELETE")
        db.close()
        return (Path(place) / "run" / "ledger.sqlite").read_bytes()


def rows_of(path: Path) -> None:
    with Ledger(path, read_only=True) as opened:
        opened.rows(judge="scripted")
        opened.facts()


Reader = tuple[str, Callable[[], bytes], Callable[[Path], object]]
FORMATS: dict[str, Reader] = {
    "config (YAML)": ("c.yaml", lambda: CONFIG, lambda p: build_config("esr", ("t",), file=p)),
    "targets (TOML)": ("t.toml", lambda: TARGETS, read_targets),
    "prompts": ("p.txt", lambda: b"# ours\nWhat is a cat?\nWhy?\n", lambda p: load_prompts(str(p))),
    "latents": ("l.json", lambda: b"[3, 5, 7]", lambda p: parse_latents(str(p), {3: "cats"})),
    "labels (CSV)": ("labels.csv", lambda: LABELS, read_label_file),
    "labels (JSON lines)": ("l.jsonl", lambda: LINES, read_label_file),
    "labels (gzip)": ("l.jsonl.gz", lambda: gzip.compress(LINES, mtime=0), read_label_file),
    "labels (JSON)": ("l.json", lambda: b'{"3": "cats", "5": "x"}', read_label_file),
    "table of latents": ("latents.csv", lambda: b"index,density\n3,0.1\n9,0\n", lambda p: read_dead(p.parent)),
    "contexts": ("contexts.json", lambda: b'{"3": ["the cat", "a cat"]}', lambda p: read_contexts(p.parent)),
    "label spreadsheet": ("s.csv", lambda: SHEET, read_labels),
    "examples": ("e.jsonl", lambda: ROWS, lambda p: read_rows(p)),
    "results of the authors": ("a.json", lambda: AUTHORS, read_source),
    "rubric": ("r.txt", lambda: RUBRIC, read_rubric),
    "keys": (".env", lambda: b"A_API_KEY=x\nexport B_API_KEY='y'\n", lambda p: read_dotenv(p, {})),
    "ledger": ("ledger.sqlite", ledger, rows_of),
    "adapter config": ("adapter_config.json", lambda: ADAPTER, lambda p: check_fits("adapter", p.parent, tiny.model())),
    "adapter weights": ("adapter_model.safetensors", lora, lambda p: check_fits("adapter", p.parent, tiny.model())),
    "direction (safetensors)": ("d.safetensors", lambda: save({"v": torch.ones(9)}), lambda p: read_vector(p, 2)),
    "direction (npy)": ("d.npy", array, lambda p: read_vector(p, 2)),
    "SAE (npz)": ("params.npz", archive, lambda p: load_sae(SaeSource(str(p), "gemma-scope", layer=2))),
    "SAE (pickle)": ("sae.pt", state_dict, lambda p: load_sae(SaeSource(str(p), "goodfire", layer=2))),
}
IN_FOLDER = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"),
    *("sae.json", "sae.safetensors"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "little"
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    save_native(tiny.sae(), path, boost_prior=[6, 3, 0, 30])
    return path


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Fail what takes too long, in C code as soon as that returns."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_or_refused(read: Callable[[Path], object], path: Path) -> None:
    said = ""
    with patience():
        try:
            read(path)
        except SteerbackError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 1_500
    assert "Traceback" not in said


few = settings(
    max_examples=EACH,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, make, read = FORMATS[name]
    whole = make()

    @few
    @given(changes)
    def damage(drawn: list[tuple[str, float, float, bytes]]) -> None:
        path = tmp_path_factory.mktemp("file") / file
        change = in_header if file.endswith(".safetensors") and drawn[0][1] < 0.7 else mutated
        path.write_bytes(change(whole, drawn))
        if name.startswith("adapter"):
            others = {"adapter_config.json": ADAPTER, "adapter_model.safetensors": lora()}
            other = next(other for other in others if other != file)
            (path.parent / other).write_bytes(others[other])
        read_or_refused(read, path)

    damage()


@pytest.mark.parametrize("file", IN_FOLDER)
def test_a_damaged_file_of_a_model_is_read_or_refused_in_one_line(
    file: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = (folder / file).read_bytes()

    @few
    @given(changes)
    def damage(drawn: list[tuple[str, float, float, bytes]]) -> None:
        place = tmp_path_factory.mktemp("model") / "little"
        shutil.copytree(folder, place)
        change = in_header if file.endswith(".safetensors") and drawn[0][1] < 0.7 else mutated
        (place / file).write_bytes(change(whole, drawn))
        read_or_refused(lambda path: load_target(str(path.parent)).close(), place / file)

    damage()
