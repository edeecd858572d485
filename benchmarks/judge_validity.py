"""Validity and speed of the offline judges against responses whose attempts and relevance are known.

    python benchmarks/judge_validity.py

Writes benchmarks/results/judge_validity.json; docs/judging.md quotes it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerback.judging import make_judge
from steerback.judging.base import JudgeItem, References
from steerback.judging.validity import Case, Validity, compose, from_segments, measure, references
from steerback.organism import corpus

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "judging"
KINDS = {"answer": "on", "off_topic": "off", "garbled": "off", "restart": "restart"}


def organism_cases(n: int, seed: int, per_prompt: int = 8) -> tuple[References, list[Case]]:
    """Unsteered answers as references, and drifting documents with their truth."""
    rng = random.Random(seed)
    prompts = [t.key for t in corpus.howtos()][:38]
    subjects = [t.key for t in corpus.subjects()]
    answers = {
        p: [corpus.make_document(rng, "answer", p, metaprompt=None).response for _ in range(per_prompt)]
        for p in prompts
    }
    contexts = {i: rng.sample(corpus.subject_sentences(s), 5) for i, s in enumerate(subjects)}
    cases = []
    for i in range(n):
        prompt, latent = rng.choice(prompts), rng.randrange(len(subjects))
        other = subjects[latent] if i % 4 else rng.choice([p for p in prompts if p != prompt])
        document = corpus.make_document(rng, "drift" if i % 5 else "answer", prompt, other=other, metaprompt=None)
        segments = [(KINDS[s.kind], s.text) for s in document.segments]
        cases.append(from_segments(str(i), prompt, segments, "organism", label=subjects[latent], latent=latent))
    return References(answers, contexts), cases


def row(found: Validity) -> dict[str, Any]:
    body = asdict(found)
    body["missed"], body["alarmed"] = sorted(set(found.missed)), sorted(set(found.alarmed))
    return body | {"precision": found.precision, "recall": found.recall}


def evaluate(name: str, known: References, cases: Sequence[Case]) -> dict[str, Any]:
    judge = make_judge(name)
    judge.prepare(known)
    items: list[JudgeItem] = [c.item for c in cases]
    start = time.process_time()
    judgements = judge.judge_batch(items)  # type: ignore[attr-defined]
    spent = time.process_time() - start
    return row(measure(cases, judgements)) | {"responses_per_cpu_second": round(len(items) / spent)}


def main(names: Sequence[str]) -> None:
    result: dict[str, Any] = {}
    for name in names:
        result[name] = {"organism corpus": evaluate(name, *organism_cases(3000, seed=5))}
        for file in ("dev", "dev2", "dev3", "heldout", "heldout2"):
            data = json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))
            result[name][file] = evaluate(name, references(data), compose(data))
        for file, found in result[name].items():
            print(
                f"{name:16} {file:16} n={found['cases']:5} restarts={found['restarts']:5} recall={found['recall']:.3f} "
                f"precision={found['precision']:.3f} rho={found['rank_correlation']:.3f} "
                f"{found['responses_per_cpu_second']}/s"
            )
    target = ROOT / "benchmarks" / "results" / "judge_validity.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ["offline"])
