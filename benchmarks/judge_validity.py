"""Validity and speed of the offline judges on responses with known attempts and relevance.

    python -m benchmarks.judge_validity [--run RUN_FOLDER] [judge ...]

Real text comes from a model that no judge was trained on. Restarts detected in its unsteered responses are false ones
(each is stored, to be read), and held-out phrasings are set into its responses. With a finished run of the organism,
text that it generated under steering is judged too: its truth is, for each sentence, the nearest corpus sentence (at
least 0.75 of the words in order), and off topic where there is none.
Writes benchmarks/results/judge_validity.json; docs/judging.md quotes it.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerback.judging import make_judge
from steerback.judging.base import JudgeItem, References
from steerback.judging.text import sentences, words
from steerback.metrics import wilson
from steerback.organism import corpus
from steerback.organism.corpus.text import expand_all, templates
from steerback.store.run import Run
from steerback.study.study import references as references_of
from steerback.targets import resolve
from tools.judge.examples import HELD_OUT_MODEL, Response, places, responses, written
from tools.judge.validity import Case, Validity, compose, from_segments, measure, references
from tools.organism.documents import make_document, sentences_of

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "judging"
KINDS = {"answer": "on", "off_topic": "off", "garbled": "off", "restart": "restart"}


def organism_cases(n: int, seed: int, per_prompt: int = 8) -> tuple[References, list[Case]]:
    """Return unsteered answers as references, and drifting documents with their truth."""
    rng = random.Random(seed)
    prompts = [t.key for t in corpus.howtos()][:38]
    subjects = [t.key for t in corpus.subjects()]
    answers = {
        p: [make_document(rng, "answer", p, metaprompt=None).response for _ in range(per_prompt)] for p in prompts
    }
    contexts = {i: rng.sample(sentences_of(s), 5) for i, s in enumerate(subjects)}
    cases = []
    for i in range(n):
        prompt, latent = rng.choice(prompts), rng.randrange(len(subjects))
        other = subjects[latent] if i % 4 else rng.choice([p for p in prompts if p != prompt])
        document = make_document(rng, "drift" if i % 5 else "answer", prompt, other=other, metaprompt=None)
        segments = [(KINDS[s.kind], s.text) for s in document.segments]
        cases.append(from_segments(str(i), prompt, segments, "organism", label=subjects[latent], latent=latent))
    return References(answers, contexts), cases


class Corpus:
    """Return the nearest corpus sentence of a generated sentence."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[str, set[str]]] = {}
        for topic in (*corpus.howtos(), *corpus.subjects()):
            section = "off_topic" if topic.is_subject else "answer"
            made = [t.replace("{term}", term) for t in templates(section) for term in topic.terms]
            own = sentences_of(topic.key)
            for sentence in [*own, *(s for t in made for s in expand_all(t))]:
                self._known.setdefault(tuple(words(sentence)), ("sentence", set()))[1].add(topic.key)
            for phrase in () if topic.is_subject else corpus.restart_phrases(topic.key):
                for span in sentences(phrase):
                    piece = tuple(words(phrase[span.start : span.end]))
                    self._known.setdefault(piece, ("restart", set()))[1].add(topic.key)
        self._holding: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for key in self._known:
            for word in set(key):
                self._holding[word].append(key)
        self._found: dict[tuple[str, ...], tuple[str, set[str]]] = {}

    def nearest(self, sentence: str) -> tuple[str, set[str]]:
        """("sentence" or "restart", topics) of the nearest corpus sentence, ("sentence", {}) where none is."""
        key = tuple(words(sentence))
        if key in self._known:
            return self._known[key]
        if key not in self._found:
            telling = sorted(set(key) & self._holding.keys(), key=lambda w: len(self._holding[w]))[:5]
            shared = Counter(k for word in telling for k in self._holding[word][:500])
            rated = [(SequenceMatcher(None, key, k, autojunk=False).ratio(), k) for k, _ in shared.most_common(20)]
            best = max(rated, default=(0.0, ()))
            self._found[key] = self._known[best[1]] if best[0] >= 0.75 else ("sentence", set())
        return self._found[key]


def generated_cases(folder: Path) -> tuple[References, list[Case]]:
    """Return all judged responses of a run of the organism, with the truth of their sentences."""
    known, cases = Corpus(), []
    with Run.read(folder) as opened:
        target = opened.config.targets[0]
        rows = [r for r in opened.ledger.rows(target=target) if r.completion is not None]
    for r in rows:
        if r.trial.stage == "reference" or not words(r.judged_text):
            continue
        segments: list[tuple[str, str]] = []
        for span in sentences(r.judged_text):
            text = r.judged_text[span.start : span.end]
            kind, topics = known.nearest(text)
            what = "restart" if kind == "restart" else "on" if r.trial.prompt in topics else "off"
            if what == "restart" and segments and segments[-1][0] == "restart":
                segments[-1] = (what, f"{segments[-1][1]} {text}")
            else:
                segments.append((what, text))
        while segments and segments[-1][0] == "restart":  # cut off after a phrase: no further attempt
            segments.pop()
        if segments and segments[0][0] == "restart":
            segments[0] = ("off", segments[0][1])
        if segments:
            cases.append(
                from_segments(
                    r.trial.key, r.trial.prompt, segments, "generated", label=r.trial.label, latent=r.trial.latent
                )
            )
    return references_of(rows, resolve(target).contexts()), cases


def real_references() -> tuple[References, list[Response]]:
    """Return references and the unsteered responses of the held-out model that are judged."""
    unsteered = [r for r in responses(HELD_OUT_MODEL) if not r.topic]
    prompts = dict.fromkeys(r.prompt for r in unsteered)
    return References({p: [r.text for r in unsteered if r.prompt == p] for p in prompts}), unsteered


def phrasing_cases(name: str) -> list[Case]:
    """Return each held-out phrasing and hard negative of a file set into three responses of the held-out model."""
    rng, rows = random.Random(name), responses(HELD_OUT_MODEL)
    sections = written(name, DATA)
    cases = []
    for kind in ("restart", "inline", "negative"):
        for line in sections[kind]:
            for place in places(rng, rows, 3, how_to="{task}" in line or kind != "negative", earlier=False):
                text = line.replace("{task}", place.task)
                if kind == "negative" and not text[0].isalpha():
                    text = f" \n{text}\n"  # headings, list items and code stand in a line of their own
                before = place.before.rstrip(" .,;:") if kind == "inline" else place.before + place.joint
                what = "other" if kind == "negative" else "restart"
                segments = [("off", before), (what, text), ("on", place.after)]
                cases.append(from_segments(f"{name}/{len(cases)}", place.prompt, segments, kind))
    return cases


def share(part: int, of: int) -> list[float]:
    """Return a share with its Wilson interval."""
    low, high = wilson(part, of)
    return [part / of, low, high]


def real_text(name: str) -> dict[str, Any]:
    """Return false restarts in unsteered responses, recall and alarms of held-out phrasings, and the speed."""
    judge = make_judge(name)
    known, unsteered = real_references()
    judge.prepare(known)
    items = [JudgeItem(str(i), r.prompt, r.text) for i, r in enumerate(unsteered)]
    start = time.process_time()
    verdicts = judge.judge_batch(items)  # type: ignore[attr-defined]
    spent = time.process_time() - start
    flagged = [
        {"prompt": item.prompt, "before": item.response[max(a.start - 120, 0) : a.start], "phrase": a.phrase}
        for item, v in zip(items, verdicts, strict=True)
        for a in v.gated_attempts()[1:]
    ]
    false = sum(len(v.gated_attempts()) > 1 for v in verdicts)
    result: dict[str, Any] = {
        "unsteered": {
            "responses": len(items),
            "with_restart": false,
            "share": share(false, len(items)),
            "restarts": flagged,
            "seconds_per_1000": round(1000 * spent / len(items), 2),
        }
    }
    for file in ("heldout3", "heldout4"):
        cases = phrasing_cases(file)
        judged = judge.judge_batch([c.item for c in cases])  # type: ignore[attr-defined]
        counted = measure(cases, judged)
        kinds = [c for c in cases if c.kind == "negative"]
        alarms = sum(len(v.gated_attempts()) > 1 for c, v in zip(cases, judged, strict=True) if c.kind == "negative")
        result[file] = {
            "restarts": counted.restarts,
            "found": counted.found,
            "recall": share(counted.found, counted.restarts),
            "precision": share(counted.found, counted.found + counted.false_alarms),
            "hard_negatives": len(kinds),
            "alarms": alarms,
            "alarm_share": share(alarms, len(kinds)),
            "missed": sorted(set(counted.missed)),
            "alarmed": sorted(set(counted.alarmed)),
        }
    return result


def row(counted: Validity) -> dict[str, Any]:
    body = asdict(counted)
    body["missed"], body["alarmed"] = sorted(set(counted.missed)), sorted(set(counted.alarmed))
    return body | {"precision": counted.precision, "recall": counted.recall}


def evaluate(name: str, known: References, cases: Sequence[Case]) -> dict[str, Any]:
    judge = make_judge(name)
    judge.prepare(known)
    items: list[JudgeItem] = [c.item for c in cases]
    start = time.process_time()
    judgements = judge.judge_batch(items)  # type: ignore[attr-defined]
    spent = time.process_time() - start
    return row(measure(cases, judgements)) | {"responses_per_cpu_second": round(len(items) / spent)}


def main(names: Sequence[str], folder: Path | None) -> None:
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.judge_validity", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("numpy", "scikit-learn", "scipy")} | {"python": platform.python_version()},
    }
    for name in names:
        body: dict[str, Any] = {"rubric": make_judge(name).rubric, "real text": real_text(name)}
        body["organism corpus"] = evaluate(name, *organism_cases(3000, seed=5))
        if folder is not None:
            body["organism, generated"] = evaluate(name, *generated_cases(folder))
        for file in ("dev", "dev2", "dev3", "heldout", "heldout2"):
            data = json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))
            body[file] = evaluate(name, references(data), compose(data))
        result[name] = body
        print(json.dumps(body["real text"], indent=1, ensure_ascii=False))
        for file, case in list(body.items())[2:]:
            print(
                f"{name:16} {file:20} n={case['cases']:5} restarts={case['restarts']:5} recall={case['recall']:.3f} "
                f"precision={case['precision']:.3f} rho={case['rank_correlation']:.3f} "
                f"{case['responses_per_cpu_second']}/s"
            )
    target = ROOT / "benchmarks" / "results" / "judge_validity.json"
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    run = Path(arguments.pop(arguments.index("--run") + 1)) if "--run" in arguments else None
    main([a for a in arguments if a != "--run"] or ["offline", "offline-bayes"], run)
