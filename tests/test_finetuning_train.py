"""Training: the loss depends only on trained tokens, not on micro-batch, memory or interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

import tiny
from steerback.errors import SteerbackError
from steerback.finetuning.segments import IGNORED, Tokens
from steerback.finetuning.settings import TrainingSettings
from steerback.finetuning.train import TrainingReport, fit

QUICK = TrainingSettings(rank=4, dropout=0.0, learning_rate=1e-3, epochs=1, warmup_steps=1, evaluations=2)


def rows(n: int, seed: int = 0) -> list[Tokens]:
    """Rows of 4 to 12 random tokens; about half of them trained, in several pieces."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(4, 13, (1,), generator=draw))
        ids = torch.randint(10, 300, (length,), generator=draw).tolist()
        trained = torch.rand(length, generator=draw) < 0.5
        trained[-1] = True
        found.append(Tokens(tuple(ids), tuple(i if t else IGNORED for i, t in zip(ids, trained.tolist(), strict=True))))
    return found


def small() -> Any:
    return tiny.model(layers=2, scale=0.1)


class Gradients(TrainerCallback):
    """The adapter's gradients and weights before the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if not self.found:
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            self.found = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
            self.weights = {n: p.detach().clone() for n, p in named.items()}


def train(folder: Path, data: Sequence[Tokens], settings: TrainingSettings = QUICK, **options: Any) -> TrainingReport:
    return fit(small, tiny.tokenizer(), data, options.pop("validation", ()), settings, folder, **options)


def first_step(folder: Path, data: Sequence[Tokens]) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and gradients (up to the clipping's factor) of the first step."""
    seen = Gradients()
    report = train(folder, data, QUICK.changed(max_steps=1), callbacks=[seen])
    return report.curves.training[0].loss, seen.found, seen.weights


def adapted(weights: dict[str, torch.Tensor]) -> Any:
    """The tiny model with the trainer's own first adapter, through plain peft and transformers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(small(), config)
    assert set(weights) == {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model


def by_hand(data: Sequence[Tokens], weights: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean of -log p over the trained tokens, one row at a time without padding or labels; its gradients."""
    model = adapted(weights)
    total, count = torch.zeros(()), 0
    for row in data:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for t in range(1, len(row.input_ids)):
            if row.labels[t] != IGNORED:
                total = total - functional.log_softmax(logits[t - 1], dim=-1)[row.input_ids[t]]
                count += 1
    loss = total / count
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to one common factor (the trainer clips the norm to 1)."""
    assert a.keys() == b.keys()
    one, other = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
    assert one.norm() > 1e-4
    torch.testing.assert_close(one / one.norm(), other / other.norm(), atol=tolerance, rtol=tolerance)


def test_loss_and_gradients_are_those_computed_by_hand(tmp_path: Path) -> None:
    data = rows(8)
    loss, gradients, weights = first_step(tmp_path, data)
    want, by_autograd = by_hand(data, weights)
    assert loss == pytest.approx(want, rel=1e-5)
    alike(gradients, by_autograd)
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in gradients} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_what_is_masked_has_no_say(tmp_path: Path) -> None:
    """Masked tokens that nothing trained comes after may be any others: loss and gradients stay what they are, bit for
    bit. (Those before are what the model reads; as targets they are nowhere in the sum, as the test above shows.)"""
    data = [Tokens((*r.input_ids, 11, 12, 13), (*r.labels, IGNORED, IGNORED, IGNORED)) for r in rows(8)]
    other = [Tokens((*r.input_ids[:-3], 201, 202, 203), r.labels) for r in data]
    trained = [Tokens((*r.input_ids[:-3], 201, 202, 203), (*r.labels[:-3], 201, 202, 203)) for r in data]
    loss, gradients, _ = first_step(tmp_path / "a", data)
    loss_other, gradients_other, _ = first_step(tmp_path / "b", other)
    assert loss == loss_other
    assert all(torch.equal(gradients[name], gradients_other[name]) for name in gradients)
    loss_trained, _, _ = first_step(tmp_path / "c", trained)
    assert loss_trained != loss  # the same tokens, unmasked, do have one


def test_targets_that_are_masked_never_enter(tmp_path: Path) -> None:
    """The gradient at the logits is zero wherever the next token is masked, and only there."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from steerback.finetuning.train import dataset

    data = rows(4)
    trainer = SFTTrainer(
        model=small(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        train_dataset=dataset(data),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    batch = trainer.data_collator([{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in data])
    caught: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        caught.append(output.last_hidden_state)

    handle = trainer.model.get_base_model().model.register_forward_hook(keep)
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    handle.remove()
    assert caught[0].grad is not None
    touched = caught[0].grad.abs().sum(-1) > 0
    wanted = torch.zeros_like(touched)
    wanted[:, :-1] = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(touched, wanted)


def short_of_memory(most: int) -> Any:
    """A model for which memory runs out above so many rows."""
    model = small()
    inner = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (planted)")
        return inner(*args, **kwargs)

    model.model.forward = forward
    return model


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_one(tmp_path: Path) -> None:
    data, said = rows(40), []
    report = fit(
        lambda: short_of_memory(2), tiny.tokenizer(), data, (), QUICK, tmp_path / "a", say=said.append, name="x"
    )
    assert report.out_of_memory == ["8 -> 4", "4 -> 2"]
    assert (report.micro_batch, report.accumulation) == (2, 4)
    assert any("out of memory at a micro-batch of 8; continuing with 4" in line for line in said)
    whole = train(tmp_path / "b", data)
    assert (whole.micro_batch, whole.accumulation, whole.out_of_memory) == (8, 1, [])
    assert [p.step for p in report.curves.training] == [p.step for p in whole.curves.training] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(
        [p.loss for p in report.curves.training], [p.loss for p in whole.curves.training], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(SteerbackError, match="out of memory with a single row"):
        fit(lambda: short_of_memory(0), tiny.tokenizer(), data, (), QUICK, tmp_path / "c", name="x")


def test_it_learns_what_is_trained_and_reports_both_parts(tmp_path: Path) -> None:
    half = [Tokens((20, 21, 22, 23, *range(30, 38)), (IGNORED,) * 4 + tuple(range(30, 38)))] * 32
    settings = QUICK.changed(learning_rate=2e-2, epochs=6, evaluations=3)
    report = train(tmp_path, half, settings, validation=half[:4])
    first, last = report.curves.validation[0], report.curves.validation[-1]
    assert last.trained < 0.6 * first.trained
    assert first.masked is not None
    assert last.masked is not None
    assert last.masked > 0.9 * first.masked  # nothing teaches it these
    assert report.steps == 24


def test_a_loss_of_nan_ends_the_training_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SteerbackError, match=r"the loss is (nan|inf) at step \d+; lower learning_rate"):
        train(tmp_path, rows(16), QUICK.changed(learning_rate=1e30, warmup_steps=0, epochs=4))


def test_training_does_not_use_cudnns_attention(tmp_path: Path) -> None:
    """Its backward pass gave NaN on an H200 for a padded batch with 320 positions."""
    used: list[bool] = []

    class Looks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            used.append(torch.backends.cuda.cudnn_sdp_enabled())

    before = torch.backends.cuda.cudnn_sdp_enabled()
    train(tmp_path, rows(8), QUICK.changed(max_steps=2), callbacks=[Looks()])
    assert used == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_no_example_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerbackError, match="there is no training example"):
        train(tmp_path, [])
    for values, says in (
        ({"rate": 1}, "unknown setting 'rate'; choose one of: alpha, batch_size"),
        ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
        ({"rank": "many"}, "rank: Input should be a valid integer"),
        ({"rank": 2.5}, "rank: Input should be a valid integer"),
        ({"learning_rate": -1.0}, "learning_rate: Input should be greater than 0"),
        ({"schedule": "step"}, "schedule: Input should be 'cosine', 'linear'"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
    ):
        with pytest.raises(SteerbackError, match=says):
            TrainingSettings().changed(**values)
    with pytest.raises(SteerbackError, match="cannot be divided evenly over 3 devices"):
        TrainingSettings().micro_sizes(3)
    with pytest.raises(SteerbackError, match="micro_batch 3 does not divide"):
        TrainingSettings(micro_batch=3).micro_sizes()
    assert TrainingSettings().micro_sizes(2) == [4, 2, 1]
    assert TrainingSettings(batch_size=12).micro_sizes() == [12, 6, 3, 1]


def test_the_specifications_settings_are_the_defaults() -> None:
    s = TrainingSettings()
    assert (s.rank, s.alpha, s.dropout, s.learning_rate, s.schedule) == (32, 16, 0.05, 2e-4, "cosine")
    assert (s.epochs, s.batch_size, s.warmup_steps, s.sequence_length) == (4, 8, 10, 4096)
