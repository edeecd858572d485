"""Weights quantised to fp8 while they are loaded: the edits on top of them are the ones that were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from small import EFFECT, Pair
from test_engine import CASES, collect, tokens, words

from steerback.records import Recording, Request, Sampling


@pytest.mark.skipif(not small.GPU, reason="vLLM quantises to fp8 on GPUs")
def test_edits_on_fp8_weights_do_what_they_do_on_float32(tmp_path: Path) -> None:
    """Quantising moves all log-probabilities; under every edit it moves them no further than without, and the edit's
    own effect is there. Receipts and the length of recordings are exact."""
    target = replace(small.write(tmp_path), dtype="bfloat16")
    pair = Pair(target, replace(target, dtype="float32"), quantization="fp8")
    try:
        ids, effect, error = tokens(1, 40), {}, {}
        for name, edits in {"none": (), **CASES}.items():
            want, plain = (pair.reference.teacher_forced(ids, e, 15).log_softmax(-1).numpy() for e in (edits, ()))
            error[name] = np.abs(pair.vllm.teacher_forced(ids, edits, 15) - want).mean()
            effect[name] = np.abs(want - plain)
            small.SEEN[f"on average with fp8 weights, {name} (effect {effect[name].mean():.2f})"] = error[name]
        for name in CASES:
            assert effect[name].max() > EFFECT, name
            assert error[name] < min(2 * error["none"], effect[name].mean() / 4), name
        record = Recording((3, 5, 8))
        requests = [
            Request(n, words(2, 20), 0, Sampling(0.0, max_new_tokens=9), e, record=record) for n, e in CASES.items()
        ]
        for key, done in collect(pair.vllm, requests).items():
            assert done.receipt_matches(CASES[key])
            if key == "add":
                assert done.receipt.added_norm == pytest.approx(CASES[key][0].value, rel=1e-2)  # a unit direction
            assert done.activations is not None
            assert done.activations.shape == (done.prompt_tokens + len(done.token_ids) - 1, 3)
    finally:
        pair.vllm.close()
