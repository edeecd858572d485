"""vLLM's own worker, with tables beside the model: what `worker_cls` names, so that no steered engine runs without it.

Runs in vLLM's worker processes, one per GPU. Under tensor parallelism every worker holds the same tables; the residual
stream is whole on each of them, so all edit alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.platforms import current_platform

from steerback.engines.vllm import runner_v1, runner_v2
from steerback.engines.vllm.settings import Settings
from steerback.engines.vllm.slots import Slots
from steerback.engines.vllm.tables import LayerTable, Shared, steer_layer
from steerback.errors import SteerbackError
from steerback.targets.sae import Sae, load_sae

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class SteeredWorker(Base):  # type: ignore[misc]
    """Loads the model as usual, then puts tables into the layers and hooks onto the model runner."""

    steerback: Slots

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        out = super().load_model(*args, **kwargs)
        settings = Settings.from_config(self.vllm_config.additional_config)
        self.steerback = install(self.model_runner, settings, self.device, first=self.rank == 0)
        return out

    def steerback_fetch(self, wanted: list[list[Any]]) -> dict[str, list[dict[str, Any]]]:
        """Results of finished requests; recordings come from the first worker alone."""
        return self.steerback.fetch([(k, p, n) for k, p, n in wanted], records=self.rank == 0)

    def steerback_release(self, keys: list[str]) -> None:
        """Frees the rows of aborted requests."""
        self.steerback.release(keys)

    def steerback_runner(self) -> str:
        """Which generation of model runner is at work."""
        return "v2" if generation(self.model_runner) is runner_v2 else "v1"


def generation(runner: Any) -> Any:
    """The module that knows this model runner's hook points."""
    for module in (runner_v2, runner_v1):
        if module.matches(runner):
            return module
    raise SteerbackError(f"vLLM {vllm.__version__}: {type(runner).__name__} has none of the known hook points")


def install(runner: Any, settings: Settings, device: torch.device, first: bool) -> Slots:
    """Steers the loaded model of `runner`; the `first` worker also pools over the whole SAE."""
    hooks = generation(runner)
    layers = decoder_layers(runner.get_model(), settings)
    if not first:
        settings = replace(settings, poolers=0)
    sae = load(settings)
    whole = None
    if sae is not None and (sae.kind == "topk" or settings.poolers):
        whole = sae.to(device, torch.float32)
    shared = Shared.empty(settings, hooks.token_room(runner), runner.model_config.dtype, device)
    tables = {layer: LayerTable.empty(settings, device) for layer in settings.layers}
    for layer, table in tables.items():
        reads = settings.poolers > 0 and layer == settings.site.read_layer
        steer_layer(layers[layer], shared, table, settings, whole or sae, reads)
    slots = Slots(settings, shared, tables, sae, load_directions(settings), whole)
    hooks.hook(runner, slots)
    return slots


def decoder_layers(model: nn.Module, settings: Settings) -> nn.ModuleList:
    """The list of decoder layers, wherever the model class keeps it."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers"
        if len(module) == settings.site.n_layers and "vision" not in name
    ]
    if len(found) != 1:
        raise SteerbackError(
            f"{type(model).__name__} has no single list of {settings.site.n_layers} decoder layers; "
            "this model class cannot be steered in vLLM, use --engine transformers"
        )
    return found[0]


def load(settings: Settings) -> Sae | None:
    """The SAE on the CPU: only the columns in use, and for pooling its encoder, go to the device."""
    if settings.sae is None:
        return None
    return load_sae(Path(settings.sae["location"]), settings.sae["format"])


def load_directions(settings: Settings) -> dict[str, Tensor]:
    """The named directions."""
    if settings.directions is None:
        return {}
    from safetensors.torch import load_file

    return dict(load_file(settings.directions))

