"""Named directions: every file format, difference of means against numpy, boosts relative to the residual norm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
from steerback.api import LoadedTarget
from steerback.cli import main
from steerback.config import RunConfig
from steerback.engines import make_engine
from steerback.engines.options import TransformersOptions
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.experiments import REGISTRY, experiment_type
from steerback.experiments.base import NoOptions
from steerback.jobs.check import check, steerable
from steerback.latents import directions as making
from steerback.latents.texts import read_texts, usual_texts
from steerback.organism.corpus import passage
from steerback.records import Intervention, Request, Sampling
from steerback.study.study import Study
from steerback.targets import BoostPrior, Target, resolve
from steerback.targets.directions import (
    DirectionFacts,
    difference_of_means,
    find_directions,
    load_directions,
    read_facts,
    read_vector,
    save_direction,
    user_directions,
)
from tiny import WORDS, collect

VECTOR = torch.linspace(-1, 2, 32)
FACTS = DirectionFacts(2, 3.0, 12.0, "a test", "tiny", ("one text",))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return tiny.engine()


def gguf(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """A control vector as llama.cpp reads it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_formats_hold_the_same_vector(tmp_path: Path) -> None:
    save_direction(tmp_path / "own.safetensors", VECTOR, FACTS)
    save_file({"persona": VECTOR.half().float()}, tmp_path / "other.safetensors")
    save_file({f"layer_{n}": VECTOR * n for n in (1, 2, 3)}, tmp_path / "layers.safetensors")
    np.save(tmp_path / "array.npy", VECTOR.double().numpy())
    for name, kind in (("control.gguf", np.float32), ("half.gguf", np.float16)):
        gguf(tmp_path / name, {f"direction.{n}": (VECTOR * n).numpy().astype(kind) for n in (1, 2, 3)})
    for name, times in (
        ("own.safetensors", 1),
        ("other.safetensors", 1),
        ("layers.safetensors", 2),
        ("array.npy", 1),
        ("control.gguf", 2),  # direction.N acts on the residual after block N
        ("half.gguf", 2),
    ):
        torch.testing.assert_close(read_vector(tmp_path / name, 2), VECTOR * times, atol=3e-3, rtol=0)
    assert read_facts(tmp_path / "own.safetensors") == FACTS
    assert read_facts(tmp_path / "other.safetensors") == read_facts(tmp_path / "array.npy") == DirectionFacts()
    found = find_directions([str(tmp_path)], "x")
    assert dict(found).keys() == {"array", "control", "half", "layers", "other", "own"}
    for vector in load_directions(found, 2, "x").values():
        assert vector.norm() == pytest.approx(1, abs=1e-5)
    assert find_directions({"warmth": tmp_path / "array.npy"}, "x") == (("warmth", str(tmp_path / "array.npy")),)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "a.npy").write_bytes(b"not numpy")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 8)
    np.save(tmp_path / "b.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.ones((2, 32)))
    np.save(tmp_path / "d.npy", np.zeros(32))
    np.save(tmp_path / "e.npy", np.full(32, np.nan))
    np.save(tmp_path / "j.npy", np.ones(32, dtype=np.complex64))
    np.save(tmp_path / "l.npy", np.full(32, 3e38))  # each number is finite in float32, their norm is not
    np.save(tmp_path / "m.npy", np.full(32, 1e300))
    save_file({"direction": VECTOR.to(torch.complex64)}, tmp_path / "k.safetensors")
    save_file({"x": VECTOR, "y": VECTOR + 1}, tmp_path / "f.safetensors")
    gguf(tmp_path / "g.gguf", {"direction.1": VECTOR.numpy()})
    (tmp_path / "h.pt").write_bytes(b"x")
    for name, message in (
        ("a.safetensors", "is not a safetensors file|not a readable safetensors file"),
        ("a.npy", "not a readable .npy file"),
        ("a.gguf", "not a readable gguf file"),
        ("b.npy", "not a readable .npy file"),  # a pickle inside is not run
        ("c.npy", r"shape \(2, 32\), expected one vector"),
        ("d.npy", "is zero, contains NaN"),
        ("e.npy", "is zero, contains NaN"),
        ("l.npy", "its norm is infinite"),
        ("m.npy", "contains NaN or infinity"),
        ("f.safetensors", "has no vector for layer 2; it has x, y"),
        ("g.gguf", "has no vector for layer 2; it has direction.1"),
        ("h.pt", "unknown suffix; supported: .safetensors, .npy, .gguf"),
        ("i.npy", "there is no such file"),
        ("j.npy", "has complex numbers"),
        ("k.safetensors", "has complex numbers"),
    ):
        with pytest.raises(SteerbackError, match=message) as caught:
            read_vector(tmp_path / name, 2)
        assert "\n" not in str(caught.value)
    with pytest.raises(SteerbackError, match="no such folder or"):
        find_directions(["nowhere.npy"], "x")
    with pytest.raises(SteerbackError, match="is not a safetensors file"):
        read_facts(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ('{"layer": "three"}', "damaged facts in its header .*layer Input should be a valid integer"),
        ('{"residual_norm": [1]}', "damaged facts .*residual_norm Input should be a valid number"),
        ("[", "damaged facts in its header .*Invalid JSON"),
    ],
)
def test_facts_of_another_type_are_one_line(tmp_path: Path, facts: str, message: str) -> None:
    save_file({"direction": VECTOR}, tmp_path / "own.safetensors", {"steerback.direction": facts})
    with pytest.raises(SteerbackError, match=message) as caught:
        read_facts(tmp_path / "own.safetensors")
    assert "\n" not in str(caught.value)


def test_a_direction_of_another_layer_is_refused(tmp_path: Path) -> None:
    save_direction(tmp_path / "own.safetensors", VECTOR, FACTS)
    with pytest.raises(SteerbackError, match="was made at layer 2, but target 'x' steers at layer 3"):
        load_directions([("own", str(tmp_path / "own.safetensors"))], 3, "x")


def test_without_gguf_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf(tmp_path / "a.gguf", {"direction.2": VECTOR.numpy()})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SteerbackError, match=r"gguf files need the extra 'gguf': pip install 'steerback\[gguf\]'"):
        read_vector(tmp_path / "a.gguf", 2)


def test_difference_of_means_equals_numpy(engine: TransformersEngine) -> None:
    positive = [" ".join(WORDS[n : n + 4 + n]) for n in range(4)]
    negative = [" ".join(reversed(WORDS[n : n + 5])) for n in range(6)]
    vector, facts = making.from_texts(engine, positive, negative, 1, "a test")

    plain, prompter = tiny.model(), engine.runner.prompter
    norms: list[float] = []

    def mean(text: str, keep: bool) -> np.ndarray[Any, Any]:
        ids, head = prompter.tokens("", text), prompter.tokens("")
        with torch.no_grad():
            h = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, len(head) :].double().numpy()
        norms.extend(np.linalg.norm(h, axis=1) if keep else ())
        return h.mean(axis=0)

    wanted = np.mean([mean(t, False) for t in positive], axis=0) - np.mean([mean(t, True) for t in negative], axis=0)
    np.testing.assert_allclose(vector.numpy(), wanted, atol=1e-3)
    assert facts.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-3)
    assert facts.residual_norm == pytest.approx(float(torch.tensor(norms).median()), rel=1e-3)
    assert (facts.layer, facts.contexts) == (1, tuple(positive))
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    np.testing.assert_allclose(difference_of_means(a, b), a.numpy().mean(0) - b.numpy().mean(0), atol=1e-6)


def test_making_refuses_what_makes_no_sense(engine: TransformersEngine, tmp_path: Path) -> None:
    texts = [f"{word} stone" for word in WORDS[:5]]
    with pytest.raises(SteerbackError, match="2 positive texts; give at least 3"):
        making.from_texts(engine, texts[:2], texts[2:], 1, "")
    with pytest.raises(SteerbackError, match="is on both sides"):
        making.from_texts(engine, texts, texts, 1, "")
    with pytest.raises(SteerbackError, match=r"layer 9 is outside 0\.\.3"):
        making.from_texts(engine, texts[:3], ["a", "b", "c"], 9, "")
    np.save(tmp_path / "a.npy", np.ones(31))
    with pytest.raises(SteerbackError, match="has width 31, but the model has width 32"):
        making.from_file(engine, tmp_path / "a.npy", texts, 1)
    with pytest.raises(SteerbackError, match="does not exist"):
        read_texts(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(SteerbackError, match="has no text"):
        read_texts(tmp_path / "empty.txt")


def test_a_file_is_taken_over_with_the_residuals_norm(engine: TransformersEngine, tmp_path: Path) -> None:
    np.save(tmp_path / "warmth.npy", 4 * VECTOR.numpy())
    vector, facts = making.from_file(engine, tmp_path / "warmth.npy", WORDS[:6], 2)
    torch.testing.assert_close(vector, 4 * VECTOR)
    assert facts.norm == pytest.approx(4 * float(VECTOR.norm()))
    assert facts.source == "file warmth.npy"
    mean, sd, low, high = facts.prior() or ()
    assert facts.residual_norm is not None
    assert (mean, sd, low, high) == pytest.approx(
        (0.5 * facts.residual_norm, 0.3 * facts.residual_norm, 0, 2 * facts.residual_norm)
    )


def test_a_boost_is_the_norm_of_what_is_added(tmp_path: Path) -> None:
    save_direction(tmp_path / "own.safetensors", 7 * VECTOR, FACTS)
    files = find_directions([str(tmp_path)], "tiny")
    engine = TransformersEngine(
        tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), None, directions=("own",)),
        directions=load_directions(files, 2, "tiny"),
    )
    edits = (Intervention("add", "own", 5.0),)
    greedy = Sampling(temperature=0, max_new_tokens=6)
    done = collect(engine, [Request("a", "the cat", 1, greedy, edits), Request("b", "the cat", 1, greedy)])
    assert done["a"].receipt_matches(edits)
    assert done["a"].receipt.added_norm == pytest.approx(5.0, rel=1e-4)
    assert done["b"].receipt.positions == 0
    assert done["a"].token_ids != done["b"].token_ids
    with pytest.raises(SteerbackError, match="'other' is not a known direction; choose one of: own"):
        collect(engine, [Request("a", "the cat", 1, greedy, (Intervention("add", "other", 1.0),))])


def write(target: str, name: str) -> None:
    facts = DirectionFacts(3, 2.0, 60.0, contexts=("Lava flows.",))
    save_direction(user_directions(target) / f"{name}.safetensors", torch.ones(160), facts)


def test_a_run_is_shaped_by_the_directions_it_uses_alone() -> None:
    write("organism", "lava")
    write("organism", "snow")
    config = RunConfig(experiment="esr", targets=("organism",), judge="offline", engine="transformers")
    assert check(config).targets[0].directions() == ()
    used = check(config.model_copy(update={"latents": ("lava",)})).targets[0]
    assert used.directions() == ("lava",)
    assert used.contexts()["lava"] == ("Lava flows.",)
    assert "snow" not in used.contexts()
    assert used.prior_of("lava") == BoostPrior(30, 18, 0, 120)
    assert used.prior_of(2) == used.boost_prior
    engines = [
        make_engine(t, TransformersOptions(batch_size=4)) for t in (used, used.with_directions(()), resolve("organism"))
    ]
    assert len({e.fingerprint for e in engines}) == 3
    with pytest.raises(SteerbackError, match="'ice' is not an index, a label or a direction"):
        check(config.model_copy(update={"latents": ("ice",)}))


def test_without_an_sae_what_needs_one_says_so() -> None:
    prior = BoostPrior(5, 5, 0, 20)
    bare = Target("bare", "memory", 2, 2, prior)
    config = RunConfig(experiment="esr", targets=("bare",))
    with pytest.raises(SteerbackError, match="neither an SAE nor directions to steer with; make one with: steerback"):
        steerable(bare, config, experiment_type("esr")(NoOptions()))
    led = Target("bare", "memory", 2, 2, prior, direction_files=(("a", "a.npy"),))
    needing = {n for n in REGISTRY if experiment_type(n).needs_sae}
    assert needing == {
        *("detectors", "detector-ablation", "random-ablation"),
        *("detector-statistics", "traces", "episode-statistics"),
    }
    for name in needing:
        with pytest.raises(SteerbackError, match=f"{name} reads SAE latents and target 'bare' has no SAE"):
            steerable(led, config, experiment_type(name)(experiment_type(name).options_type()))
    assert steerable(led, config, experiment_type("esr")(NoOptions())) == led  # all its directions are steered with
    with pytest.raises(SteerbackError, match="target 'bare' has no SAE, so there is no latent 7; its directions: a"):
        steerable(led, config.model_copy(update={"latents": ("a", 7)}), experiment_type("esr")(NoOptions()))
    assert led.prior_of("a") == prior


def test_all_directions_of_a_target_without_sae_are_its_latents() -> None:
    target = Target("bare", "memory", 2, 2, BoostPrior(5, 5, 0, 20), direction_files=(("a", "a.npy"), ("b", "b.npy")))
    study: Any = Study.__new__(Study)
    study.target, study.config = target, RunConfig(experiment="esr", targets=("bare",))
    chosen = asyncio.run(Study._select(study))
    assert [entry.key for entry in chosen.chosen] == ["a", "b"]
    assert [entry.label for entry in chosen.chosen] == ["a", "b"]
    assert chosen.counts == {"directions of the target": 2}


def test_verbs_make_show_and_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out + said.err

    rng = random.Random(3)
    (tmp_path / "lava.txt").write_text("\n".join(" ".join(passage(rng, "volcanoes", 3)) for _ in range(12)))
    (tmp_path / "rest.txt").write_text("\n".join(usual_texts(resolve("organism"))[:20]))
    base = ("directions", "make", "organism", "lava")
    code, said = verb(*base)
    assert code == 2
    assert "one way to make a direction" in said
    code, said = verb(*base, "--positive", str(tmp_path / "lava.txt"), "--negative", str(tmp_path / "rest.txt"))
    assert code == 0, said
    assert "layer 3, norm" in said
    assert "boost prior N(" in said
    assert verb(*base, "--topic", str(tmp_path / "lava.txt"))[1].count("exists already") == 1
    assert verb(*base, "--topic", str(tmp_path / "lava.txt"), "--overwrite")[0] == 0
    assert read_facts(user_directions("organism") / "lava.safetensors").source.startswith(
        "topic minus neutral texts, 12"
    )
    code, said = verb("directions", "show", "organism")
    assert "lava                 layer 3, norm" in said
    code, said = verb(
        *(
            "try",
            "organism",
            "Explain how to boil an egg.",
            "--latent",
            "lava",
            "--boost",
            "20",
            "--max-new-tokens",
            "8",
        )
    )
    assert code == 0, said
    assert "mean norm added 20" in said
    assert json.loads(json.dumps(resolve("organism").describe()))["direction_files"]


def test_loaded_targets_know_their_directions(tmp_path: Path) -> None:
    loaded = LoadedTarget(Target("x", "m", 0, 0, BoostPrior(1, 1, 0, 2), direction_files=(("a", "f"),)), None)  # type: ignore[arg-type]
    assert loaded.latent("a") == "a"


def test_a_table_with_directions_alone_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model().half().save_pretrained(tmp_path / "bare")
    tiny.tokenizer().save_pretrained(tmp_path / "bare")
    (tmp_path / "words.txt").write_text("\n".join(" ".join(WORDS[n : n + 5]) for n in range(6)))
    table = '[bare]\nmodel = "bare"\nsteer_layer = 2\nread_layer = 2\nmax_new_tokens = 8\n'
    file = tmp_path / "own.toml"
    file.write_text(table)
    monkeypatch.setenv("STEERBACK_TARGETS", str(file))
    assert not resolve("bare").has_sae
    config = RunConfig(experiment="esr", targets=("bare",), judge="offline", engine="transformers")
    with pytest.raises(SteerbackError, match="make one with: steerback directions make bare NAME --topic FILE"):
        check(config)
    with pytest.raises(SystemExit) as left:
        main(["directions", "make", "bare", "words", "--topic", str(tmp_path / "words.txt")])
    assert left.value.code == 0
    found = resolve("bare")
    facts = found.direction_facts("words")
    assert found.directions() == ("words",)
    assert facts.residual_norm is not None
    assert found.boost_prior.mean == pytest.approx(0.5 * facts.residual_norm)
    assert check(config).targets[0].directions() == ("words",)
    assert check(config).config.latents == ("words",)  # pinned: one more in the folder does not change the run
    np.save(tmp_path / "foreign.npy", VECTOR.numpy())
    file.write_text(table.replace("bare", "other", 1) + 'directions = "foreign.npy"\n')
    with pytest.raises(SteerbackError, match="its direction files lack the residual's norm"):
        resolve("other")
    file.write_text(table + 'directions = { warmth = "foreign.npy" }\nboost_prior = [4, 2, 0, 20]\n')
    with make_and_close(resolve("bare")) as engine:
        assert set(engine.directions) == {"warmth", "words"}
    assert resolve("bare").boost_prior == BoostPrior(4, 2, 0, 20)


@contextlib.contextmanager
def make_and_close(target: Target) -> Iterator[Any]:
    engine = make_engine(target, TransformersOptions(batch_size=2))
    try:
        yield engine
    finally:
        engine.close()
