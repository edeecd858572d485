"""Training that is killed goes on to the end that it would have reached."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from children import in_child
from safetensors.torch import load_file

from test_finetuning_train import QUICK, TrainerCallback, rows, train

LONG = QUICK.changed(dropout=0.1, evaluations=4)


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder: Path, _: Any) -> None:
    train(folder, rows(64), LONG, validation=rows(8, 1), callbacks=[Kill()])


def test_killed_training_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Dropout is on, so that the random state has to be restored as well."""
    whole = train(tmp_path / "whole", rows(64), LONG, validation=rows(8, 1))
    assert in_child(train_and_die, tmp_path / "killed")[0] == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    resumed = train(tmp_path / "killed", rows(64), LONG, validation=rows(8, 1))
    assert resumed.resumed_from == 4
    assert resumed.final_loss == pytest.approx(whole.final_loss, rel=1e-5)
    assert [p.step for p in resumed.curves.validation] == [p.step for p in whole.curves.validation] == [0, 2, 4, 6, 8]
    assert resumed.curves.validation[-1].trained == pytest.approx(whole.curves.validation[-1].trained, rel=1e-5)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-4)
