"""Targets in memory: generate single responses, several responses to one prompt, or activations along a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

from steerback.engines.base import finish
from steerback.errors import SteerbackError, clipped, one_line
from steerback.judging.restarts import find_restarts
from steerback.judging.text import Span
from steerback.latents.sampling import check_latents
from steerback.organism import EXAMPLES, SteeringExample
from steerback.records import (
    Completion,
    FinishReason,
    Intervention,
    LatentKey,
    Receipt,
    Recording,
    Request,
    Sampling,
    WindowScores,
)
from steerback.report.transcripts import Marks, marked_html, print_marked
from steerback.targets import Target, resolve

EDITED = {"add": "boost", "clamp": "clamped to", "scale": "scaled by"}

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from steerback.engines.base import Engine


@dataclass(frozen=True, repr=False)
class LabelledCompletion:
    """A response with its request, the text of each token, and the names of the recorded latents.

    `record` is the plain record, as engines return it and ledgers store it. The concatenated `tokens` equal `text`.
    A token without text (end of the response, part of a character) is "".
    """

    request: Request
    record: Completion
    tokens: tuple[str, ...]
    steering: str
    """Description of the steering."""
    names: tuple[str, ...] = ()
    """Names of the recorded latents: the label if it is unique, else the index."""
    drift: tuple[Span, ...] = ()
    """Off-topic sentences; filled only by `LoadedTarget.with_drift`."""

    @property
    def text(self) -> str:
        return self.record.text

    @property
    def finish(self) -> FinishReason:
        return self.record.finish

    @property
    def receipt(self) -> Receipt:
        return self.record.receipt

    @property
    def steered_as_planned(self) -> bool:
        """True if the receipt shows edits at all planned positions and no others."""
        return self.record.receipt_matches(self.request.interventions)

    @cached_property
    def restarts(self) -> tuple[Span, ...]:
        """Restart phrases in the text, detected by the offline judge."""
        return tuple(Span(r.start, r.end) for r in find_restarts(self.text, self.request.prompt, "offline"))

    @cached_property
    def activations(self) -> pd.DataFrame | None:
        """Recorded activations: one row per latent, one column (position, token) per token; None if none exist.

        The last token of a response has no column, because it is never fed back to the model. The first
        `record.prompt_tokens` rows of `record.activations` belong to the prompt.
        """
        values = self.record.activations
        return None if values is None else labelled(values[self.record.prompt_tokens :], self.names, self.tokens)

    @property
    def marks(self) -> Marks:
        return Marks(self.text, self.drift, self.restarts)

    def show(self) -> None:
        """Print prompt, steering and text. A terminal shows restarts and marked drift in colour."""
        print_marked(self.request.prompt, [(self.steering, self.marks)])

    def __repr__(self) -> str:
        return f"<completion of {len(self.tokens)} tokens, {len(self.restarts)} restarts: {clipped(self.text)!r}>"

    def _repr_html_(self) -> str:
        return marked_html(self.request.prompt, self.steering, self.marks)


def labelled(values: NDArray[np.float32], names: Sequence[str], tokens: Sequence[str]) -> pd.DataFrame:
    """Return activations of shape (tokens, latents) as a table with one row per latent and one column per token."""
    import pandas as pd

    columns = pd.MultiIndex.from_arrays([range(len(values)), tokens[: len(values)]], names=["position", "token"])
    return pd.DataFrame(values.T + 0.0, index=pd.Index(names, name="latent"), columns=columns)


def _drift(done: LabelledCompletion, windows: WindowScores) -> tuple[Span, ...]:
    """Return the sentences with a score below 50, without restart phrases."""
    text, stops = done.text, [*windows.starts, *(r.start for r in done.restarts), len(done.text)]
    spans = []
    for start, score in zip(windows.starts, windows.scores, strict=True):
        end = start + len(text[start : min(stop for stop in stops if stop > start)].rstrip())
        spans += [Span(start, end)] if score < 50 else []
    return tuple(spans)


@dataclass(frozen=True, repr=False)
class LoadedTarget:
    """A target whose model is loaded. Use it as a context manager, or call `close`."""

    target: Target
    engine: Engine

    def __repr__(self) -> str:
        return f"<target {self.target.name}: {type(self.engine).__name__}, {self.target.n_latents:,} latents>"

    def generate(
        self,
        prompt: str,
        latent: LatentKey | None = None,
        boost: float | None = None,
        *,
        interventions: Sequence[Intervention] = (),
        seed: int = 44,
        temperature: float = 0.6,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        prefill: str = "",
        system: str | None = None,
        record: Sequence[LatentKey] = (),
    ) -> LabelledCompletion:
        """Return one response. If `latent` is set, `boost` times its direction is added at every position.

        `latent` is an index, a label or the name of a direction. `interventions` are applied in addition; their
        latents can be labels, too. `record` lists the latents to record. Raises SteerbackError, which names the
        field, for invalid values.
        """
        longest = max_new_tokens or self.target.max_new_tokens or 512
        sampling = Sampling(temperature, top_p, repetition_penalty, longest, tuple(stop))
        (response,) = self.responses(
            1,
            prompt,
            latent,
            boost,
            interventions=interventions,
            seed=seed,
            sampling=sampling,
            prefill=prefill,
            system=system,
            record=record,
        )
        return response

    def responses(
        self,
        n: int,
        prompt: str,
        latent: LatentKey | None = None,
        boost: float | None = None,
        *,
        interventions: Sequence[Intervention] = (),
        seed: int = 44,
        sampling: Sampling | None = None,
        prefill: str = "",
        system: str | None = None,
        record: Sequence[LatentKey] = (),
    ) -> list[LabelledCompletion]:
        """Return `n` responses to one prompt with the seeds `seed`, `seed` + 1, ...; see `generate`."""
        if n < 1:
            raise SteerbackError(f"n {n}: must be at least 1")
        if (latent is None) != (boost is None):
            raise SteerbackError("set latent and boost together, or neither of them for an unsteered response")
        edits = tuple(replace(edit, latent=self.latent(edit.latent)) for edit in interventions)
        if latent is not None and boost is not None:
            edits = (Intervention("add", self.latent(latent), boost), *edits)
        sampling = sampling or Sampling(max_new_tokens=self.target.max_new_tokens or 512)
        recording = Recording(self.latents(record)) if record else None
        first = Request("0", prompt, seed, sampling, edits, prefill, system, recording)
        return self.answer([replace(first, key=str(i), seed=seed + i) for i in range(n)])

    def answer(self, requests: Sequence[Request]) -> list[LabelledCompletion]:
        """Return labelled responses to several requests, decoded together, in the order of the requests."""
        return [self._labelled(r, done) for r, done in zip(requests, self.complete(requests), strict=True)]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the plain records of responses to several requests, in the order of the requests."""

        async def run() -> list[Completion]:
            done = {key: completion async for key, completion in self.engine.generate(requests)}
            return [done[request.key] for request in requests]

        return finish(run())

    def _labelled(self, request: Request, done: Completion) -> LabelledCompletion:
        ends = [0, *self.engine.token_ends(done)]
        tokens = tuple(done.text[a:b] for a, b in pairwise(ends))
        names = self.names(request.record.latents) if request.record is not None else ()
        return LabelledCompletion(request, done, tokens, self._steering(request, done.receipt), names)

    def _steering(self, request: Request, receipt: Receipt) -> str:
        labels = self.target.labels()
        edits = []
        for edit in request.interventions:
            label = labels.get(edit.latent) if isinstance(edit.latent, int) else None
            name = f"latent {one_line(edit.latent)}{f' ({one_line(label)})' if label else ''}"
            edits.append(f"{name} {EDITED[edit.mode]} {edit.value:g}")
        if not edits:
            return f"unsteered, seed {request.seed}"
        done = f"{receipt.positions} positions steered, mean norm added {receipt.added_norm:.4g}"
        return f"{', '.join(edits)}, seed {request.seed} ({done})"

    def with_drift(
        self, completions: Sequence[LabelledCompletion], unsteered: Sequence[LabelledCompletion]
    ) -> list[LabelledCompletion]:
        """Return the completions with their off-topic sentences marked (`drift`).

        The offline judge compares words with the `unsteered` responses to the same prompts.
        """
        from steerback.judging.base import JudgeItem, References
        from steerback.judging.offline import OfflineJudge

        judge, known = OfflineJudge(), dict[str, list[str]]()
        for done in unsteered:
            known.setdefault(done.request.prompt, []).append(done.text)
        judge.prepare(References(known))
        items = [JudgeItem(str(n), done.request.prompt, done.text) for n, done in enumerate(completions)]

        async def scores() -> dict[str, WindowScores]:
            return {key: windows async for key, windows in judge.windows(items)}

        scored = finish(scores())
        return [replace(done, drift=_drift(done, scored[str(n)])) for n, done in enumerate(completions)]

    def activations(self, text: str, latents: Sequence[LatentKey], *, prompt: str = "") -> pd.DataFrame:
        """Return unsteered activations along `text`: one row per latent, one column (position, token) per token.

        The text is read as a response to `prompt`, without template tokens. `latents` are indices or labels.
        """
        from steerback.engines.transformers import TransformersEngine

        chosen = self.latents(latents)
        engine = self.engine
        if not isinstance(engine, TransformersEngine) or engine.sae is None:
            raise SteerbackError(
                f"activations along a text need an SAE and the transformers engine; {self.target.name} has "
                f"{'no SAE' if self.target.sae is None else type(engine).__name__}"
            )
        layer = engine.runner.site.read_layer
        ((_, ids, states),) = engine.residuals([prompt], [text], (layer,))
        ends = [0, *engine.runner.prompter.ends(ids, len(text))]
        values = engine.sae.encode(states[layer], chosen).float().cpu().numpy()
        tokens = [text[a:b] for a, b in pairwise(ends)]
        return labelled(values, self.names(chosen), tokens)

    def latent(self, name: LatentKey) -> LatentKey:
        """Return the index of a latent from its index, digits or label; the name of a direction is not changed.

        Raises SteerbackError with similar labels if the name is unknown or not unique.
        """
        return self._keys([name], "latent")[0]

    def latents(self, names: Sequence[LatentKey]) -> tuple[int, ...]:
        """Return the indices of latents of the SAE from indices, digits or labels."""
        if isinstance(names, str):
            raise SteerbackError(f"latents {names!r} is one name; give a list: [{names!r}]")
        keys = self._keys(names, "latents")
        for key in keys:
            if isinstance(key, str):
                raise SteerbackError(f"{key!r} is a direction, which has no activations; name latents of the SAE")
        return tuple(key for key in keys if isinstance(key, int))

    def _keys(self, names: Sequence[LatentKey], where: str) -> list[LatentKey]:
        target = self.target
        return check_latents(names, target.labels(), target.n_latents or None, target.directions(), where)

    def names(self, latents: Sequence[int]) -> tuple[str, ...]:
        """Return the label of each latent, or its index if it has no unique label."""
        labels = self.target.labels()
        shown = [labels.get(k, "") for k in latents]
        return tuple(
            s if s and shown.count(s) == 1 else f"{s} ({k})" if s else str(k)
            for s, k in zip(shown, latents, strict=True)
        )

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def __enter__(self) -> LoadedTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_target(name: str | Target, engine: str = "auto", batch_size: int = 8, **options: object) -> LoadedTarget:
    """Load a built-in or user-defined target, or a `Target`; `options` are those of the engine.

    `batch_size` is small because most requests are single. A run uses larger batches. The batch shape affects
    floating-point results, so the texts of a run can differ from these.
    """
    from steerback.engines import check_engine, make_engine
    from steerback.engines.options import VllmOptions

    target = resolve(name) if isinstance(name, str) else name
    checked = check_engine(engine, options, batch_size)
    if isinstance(checked, VllmOptions):
        checked = checked.model_copy(update={"stop_strings": True})  # `LoadedTarget.generate` accepts them
    return LoadedTarget(target, make_engine(target, checked))


SEEDS = 8
"""Number of seeds to try. On a machine with other floating-point arithmetic, the first seed may show no restart."""
REFERENCES = 3
"""Number of unsteered responses that the offline judge compares the sentences with."""


def steered_and_not(
    loaded: LoadedTarget, prompt: str, latent: LatentKey, boost: float, seed: int, sampling: Sampling
) -> list[LabelledCompletion]:
    """Return the unsteered and the steered response to a prompt, decoded together."""
    edits = (Intervention("add", loaded.latent(latent), boost),)
    requests = [Request(name, prompt, seed, sampling, e) for name, e in (("plain", ()), ("steered", edits))]
    return [checked(done) for done in loaded.answer(requests)]


def example_of(target: str) -> SteeringExample:
    """Return the example of a built-in target. Raises SteerbackError if the target has none."""
    if target not in EXAMPLES:
        raise SteerbackError(
            f"try {target} needs a prompt, --latent and --boost; targets with a built-in example: {', '.join(EXAMPLES)}"
        )
    return EXAMPLES[target]


def drift_and_restart(loaded: LoadedTarget, example: SteeringExample) -> tuple[LabelledCompletion, LabelledCompletion]:
    """Return a steered response with a restart, and the same request with clamped detectors. Both have drift marks."""
    sampling = Sampling(max_new_tokens=loaded.target.max_new_tokens or 512)
    steering = (Intervention("add", loaded.latent(example.latent), example.boost),)
    clamps = tuple(Intervention("clamp", latent, 0.0) for latent in example.detectors)

    def asked(seed: int) -> list[Request]:
        first = Request(f"steered {seed}", example.prompt, seed, sampling, steering)
        return [first, replace(first, key=f"clamped {seed}", interventions=(*steering, *clamps))]

    plain = [Request(f"plain {n}", example.prompt, example.seed + n, sampling) for n in range(REFERENCES)]
    steered, clamped, *unsteered = loaded.answer([*asked(example.seed), *plain])
    if not steered.restarts:
        more = loaded.answer([r for n in range(1, SEEDS) for r in asked(example.seed + n)])
        both = zip(more[::2], more[1::2], strict=True)
        steered, clamped = next((pair for pair in both if pair[0].restarts), (steered, clamped))
    steered, clamped = loaded.with_drift([checked(steered), checked(clamped)], unsteered)
    return steered, clamped


def checked(done: LabelledCompletion) -> LabelledCompletion:
    """Return the response. Raises SteerbackError if its receipt differs from its plan."""
    if not done.steered_as_planned:
        raise SteerbackError(f"the response was not steered as planned: {done.receipt}; please report this")
    return done
