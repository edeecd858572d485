"""Sampling of tokens: exact distribution, independence of other rows, penalties as in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from steerback.engines.sampling import Sampler, inverse_cdf, nucleus, penalise, uniforms
from steerback.records import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, -30.0, -200.0])
CPU = torch.device("cpu")
NONE = torch.tensor([], dtype=torch.long)


def drawn(sampling: Sampling, n: int, logits: torch.Tensor = LOGITS) -> np.ndarray:
    """One token from each of n requests with seeds 0..n-1."""
    sampler = Sampler(n, len(logits), 1, CPU)
    for row in range(n):
        sampler.admit(row, sampling, row, NONE)
    return sampler.draw(logits.expand(n, -1), torch.zeros(n, dtype=torch.long)).numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.5, 0.95)])
def test_distribution_is_the_closed_form(temperature: float, top_p: float) -> None:
    n = 4_000
    counts = np.bincount(drawn(Sampling(temperature, top_p), n), minlength=8)
    p = np.exp(LOGITS.double().numpy() / temperature)
    p /= p.sum()
    kept = np.cumsum(p) - p < top_p  # already in descending order
    p = np.where(kept, p, 0) / p[kept].sum()
    assert counts[p == 0].sum() == 0
    big = p * n >= 5
    expected = np.append(p[big], p[~big].sum()) * n
    observed = np.append(counts[big], counts[~big].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_draws_of_one_request_are_uniform_and_distinct() -> None:
    u = uniforms(7, 5000).numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest([float(uniforms(seed, 1)) for seed in range(2000)], "uniform").pvalue > 1e-3
    assert torch.equal(uniforms(7, 5), uniforms(7, 5000)[:5])
    assert not torch.equal(uniforms(7, 5), uniforms(8, 5))
    assert len(uniforms(-1, 3)) == len(uniforms(2**70, 3)) == 3


def test_nucleus_equals_transformers() -> None:
    from transformers import TopPLogitsWarper

    g = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 50, generator=g) * 3
    u = torch.rand(200, 1, generator=g, dtype=torch.float64)
    for top_p in (0.3, 0.7, 0.99):
        kept = TopPLogitsWarper(top_p)(None, logits).isfinite()
        weights = torch.softmax(logits, -1).double()
        tokens = nucleus(weights, u, torch.full((200, 1), top_p, dtype=torch.float64))
        assert kept.gather(1, tokens[:, None]).all()
        order = logits.argsort(dim=-1, descending=True)  # the same draw, restricted by hand
        for row in range(200):
            w = (weights[row] * kept[row])[order[row]]
            n = int((w.cumsum(0) / w.sum() > u[row]).nonzero()[0])
            assert int(tokens[row]) == int(order[row][n])


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    g = torch.Generator().manual_seed(1)
    ids, logits = torch.randint(0, 50, (20, 9), generator=g), torch.randn(20, 50, generator=g)
    seen = torch.zeros(20, 50, dtype=torch.bool).scatter(1, ids, True)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, torch.full((20, 1), 1.3)), wanted)


def test_penalty_counts_prompt_and_generated_tokens() -> None:
    sampler = Sampler(2, 4, 8, CPU)
    sampler.admit(0, Sampling(0, repetition_penalty=10.0), 1, torch.tensor([0]))
    sampler.admit(1, Sampling(0), 1, torch.tensor([0]))
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(2, -1)
    steps = torch.zeros(2, dtype=torch.long)
    said = torch.stack([sampler.draw(logits, steps + n) for n in range(3)]).T.tolist()
    assert said == [[1, 2, 3], [0, 0, 0]]
    sampler.release(0)
    sampler.admit(0, Sampling(0, repetition_penalty=10.0), 1, NONE)  # nothing is left of the request before
    assert sampler.draw(logits, steps).tolist() == [0, 0]


def test_never_a_token_of_probability_zero() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    for u, token in ((0.0, 1), (1 / 3 - 1e-12, 1), (1 / 3 + 1e-12, 3), (1 - 2**-53, 3), (1.0, 3)):
        assert inverse_cdf(weights, torch.tensor([[u]], dtype=torch.float64)).item() == token


def test_greedy_and_random_rows_share_a_batch() -> None:
    sampler = Sampler(3, 8, 4, CPU)
    for row, sampling in enumerate((Sampling(0), Sampling(1.0), Sampling(1.0, 0.5))):
        sampler.admit(row, sampling, 5, NONE)
    tokens = [sampler.draw(LOGITS.expand(3, -1), torch.full((3,), n)).tolist() for n in range(4)]
    assert [t[0] for t in tokens] == [0] * 4
    alone = Sampler(1, 8, 4, CPU)
    alone.admit(0, Sampling(1.0), 5, NONE)
    assert [t[1] for t in tokens] == [int(alone.draw(LOGITS[None], torch.tensor([n]))) for n in range(4)]
    assert {t[2] for t in tokens} == {0}  # softmax of 2.0 is above one half
