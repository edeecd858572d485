"""Settings: later layers win, and errors name the field and the valid choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerback.config import PRESETS, RunConfig, build_config, differences, parse_config
from steerback.data.prompts import META_PROMPTS, load_prompts
from steerback.errors import SteerbackError


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("n_latents: 5\nsampling: {temperature: 0.1, top_p: 0.5}\npreset: quick\n")
    built = build_config("esr", ("t",), None, file, {"n_latents": 6, "judge": None}, ("sampling.temperature=0.9",))
    assert (built.preset, built.n_latents, built.judge) == ("quick", 6, "auto")
    assert (built.sampling.temperature, built.sampling.top_p) == (0.9, 0.5)
    assert built.calibration == PRESETS["quick"]("esr", ("t",)).calibration


def test_presets_differ_where_paper_facts_say_so() -> None:
    spec, authors = (build_config("esr", ("llama-3.3-70b",), p) for p in ("specification", "authors"))
    assert (spec.calibration.target_score, authors.calibration.target_score) == (50, 30)
    assert (spec.calibration.max_iterations, authors.calibration.max_iterations) == (15, 10)
    assert (spec.sampling.repetition_penalty, authors.sampling.repetition_penalty) == (1.0, 1.2)
    assert (spec.selection.relevance, authors.selection.relevance) == ("top-100", "zero")
    assert (authors.selection.concreteness, authors.selection.concreteness_threshold) == ("threshold", 65)
    assert (spec.selection.template, authors.selection.template) == (False, True)
    assert (spec.unscored_attempts, authors.unscored_attempts) == ("trial", "drop")
    assert spec.sampling.temperature == authors.sampling.temperature == 0.6
    assert (spec.seeds.latents, spec.seeds.generation, spec.degraded) == (42, 44, "include")


SIZES = {  # read by hand in the authors' configurations: penalty, latents, trials a latent, prompts a step
    "llama-3.3-70b@authors": (1.2, 50, 5, 5),
    "llama-3.1-8b@authors": (1.15, 500, 5, 1),
    "gemma-2-2b@authors": (1.1, 500, 5, 1),
    "gemma-2-9b@authors": (1.1, 500, 5, 1),
    "gemma-2-27b@authors": (1.1, 500, 5, 1),
    "organism": (1.1, 50, 5, 1),
}


def sizes(built: RunConfig, name: str) -> tuple[float, int, int, int]:
    own = built.of(name)
    steps = own.calibration.trials_per_iteration
    assert (own.calibration.max_new_tokens, own.sampling.max_new_tokens, own.calibration.weight) == (256, 512, 5)
    return own.sampling.repetition_penalty, own.n_latents, own.trials_per_latent, steps


@pytest.mark.parametrize("first", range(len(SIZES)))
def test_each_target_has_the_authors_sizes_whatever_stands_first(first: int) -> None:
    names = [*list(SIZES)[first:], *list(SIZES)[:first]]
    built = build_config("esr", tuple(name.removesuffix("@authors") for name in names), "authors")
    assert {name: sizes(built, name) for name in built.targets} == SIZES
    alone = build_config("esr", (names[0],), "authors")
    assert (sizes(alone, names[0]), alone.by_target) == (SIZES[names[0]], {})
    assert parse_config(built.model_dump(mode="json")) == built
    assert built.of(f"{names[1]}+adapter") == built.of(names[1])


def test_what_the_user_sets_beats_the_preset_for_every_target() -> None:
    both = ("llama-3.3-70b", "llama-3.1-8b")
    given = ("sampling.repetition_penalty=1", "n_latents=7", "calibration.trials_per_iteration=2")
    built = build_config("esr", both, "authors", assignments=given)
    assert [sizes(built, name) for name in built.targets] == [(1, 7, 5, 2)] * 2
    single = build_config("esr", both, "authors", overrides={"by_target": {"llama-3.1-8b@authors": {"n_latents": 9}}})
    assert [sizes(single, name)[:2] for name in single.targets] == [(1.2, 50), (1.15, 9)]
    follows = build_config("no-steering", (built.targets[1],), base=("esr", single), assignments=("n_latents=8",))
    assert sizes(follows, follows.targets[0])[:2] == (1.15, 8)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"judge": "offline"}, "unknown setting of target x 'judge'; choose one of: n_latents"),
        ({"n_latents": 0}, "settings of target x: n_latents: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_row_of_a_target_is_one_line(row: dict[str, object], words: str) -> None:
    with pytest.raises(SteerbackError, match=words):
        build_config("esr", ("x",), overrides={"by_target": {"x": row}})


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("nonsense=1", "unknown setting 'nonsense'; choose one of: .*n_latents"),
        ("sampling.heat=1", "unknown setting 'sampling.heat';.* choose one of: .*temperature"),
        ("n_latents=-3", "n_latents: .*greater than or equal to 1"),
        ("sampling.temperature=hot", "sampling.temperature: .*number"),
        ("sampling.temperature=-1", r"sampling.temperature: .*0 \(greedy\) or at least 0.0001"),
        ("sampling.temperature=1e-320", r"sampling.temperature: .*0 \(greedy\) or at least 0.0001"),
        ("sampling.temperature=.inf", "sampling.temperature: .*finite"),
        ("calibration.tolerance=.inf", "calibration.tolerance: .*finite"),
        ("seeds.generation=99999999999999999999999", "seeds.generation: .*less than or equal to"),
        ("seeds.latents=-1", "seeds.latents: .*greater than or equal to 0"),
        ("n_latents", "not of the form key=value"),
        ("a=[1", "not valid YAML"),
        ("preset=nope", "unknown preset 'nope'; choose one of: specification, authors, quick"),
        ("targets=[a, a]", "named twice"),
        ("calibration.stop=soon", "calibration.stop: .*'none' or 'tolerance'"),
        ("a." * 50_000 + "b=1", "more than 64 levels"),
        ("n_latents=" + "9" * 5000, "too many digits"),
        ("n" * 5000, "not of the form key=value"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_setting_is_one_line_with_the_choices(assignment: str, words: str) -> None:
    with pytest.raises(SteerbackError, match=words) as caught:
        build_config("esr", ("t",), assignments=(assignment,))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not valid YAML"), ("- 1", "must contain"), ("", "must contain"), ("\x00", "NUL character")],
)
def test_a_bad_config_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SteerbackError, match=words) as caught:
        build_config("esr", ("t",), file=file)
    assert "\n" not in str(caught.value)
    with pytest.raises(SteerbackError, match="does not exist"):
        build_config("esr", ("t",), file=tmp_path / "none.yaml")


def test_off_is_a_word_and_true_a_boolean(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("selection: {concreteness: off}\noptions: {a: true, b: no}\n")
    built = build_config("esr", ("t",), file=file, assignments=("selection.relevance=off",))
    assert (built.selection.concreteness, built.selection.relevance) == ("off", "off")
    assert built.options == {"a": True, "b": "no"}


def test_differences_name_what_changed() -> None:
    a = build_config("esr", ("t",))
    b = build_config("esr", ("t",), assignments=("sampling.temperature=1.0", "n_latents=7"))
    assert differences(a, b) == ["n_latents: 50 -> 7", "sampling.temperature: 0.6 -> 1.0"]
    assert differences(a, parse_config(a.model_dump(mode="json"))) == []


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("# ours\n\n Explain how a kite flies. \nHow do you bake bread?\n")
    assert load_prompts(str(file)) == ("Explain how a kite flies.", "How do you bake bread?")
    file.write_text("A\nA\n")
    with pytest.raises(SteerbackError, match="repeats 'A'"):
        load_prompts(str(file))
    file.write_text("# only a comment\n")
    with pytest.raises(SteerbackError, match="has no prompt"):
        load_prompts(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SteerbackError, match="UTF-8"):
        load_prompts(str(file))
    with pytest.raises(SteerbackError, match="choose one of: evaluation"):
        load_prompts("nowhere.txt")


def test_the_six_meta_prompts_are_the_specification_s() -> None:
    assert len(META_PROMPTS) == 6
    assert [name for name, text in META_PROMPTS.items() if "{label}" in text] == [
        "distracted-with-label",
        "steered-with-label",
    ]
