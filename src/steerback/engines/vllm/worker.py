"""A subclass of vLLM's worker that adds steering tables; `worker_cls` names it, so a steered engine always uses it.

It runs in vLLM's worker processes, one per GPU. Under tensor parallelism every worker has the same tables and the whole
residual stream, so all workers make the same edits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from steerback.engines.interventions import steer
from steerback.engines.vllm.runners import ModelRunner, follow, generation, token_room
from steerback.engines.vllm.settings import Entry, TableSettings, Ticket
from steerback.engines.vllm.slots import Arrival, EngineStep, Slots
from steerback.engines.vllm.tables import LayerTable, Shared, Steered, edit, steer_layer
from steerback.errors import SteerbackError
from steerback.targets.sae_files import load_sae

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class SteeredWorker(Base):  # type: ignore[misc]
    """Load the model as usual, then attach tables to the layers and hooks to the model runner."""

    steerback: Slots

    def load_model(self, *args: object, **kwargs: object) -> object:
        out: object = super().load_model(*args, **kwargs)
        settings: TableSettings = self.vllm_config.additional_config
        before = allocated(self.device)
        self.steerback = install(self.model_runner, settings, self.device, first=self.rank == 0)
        # Some releases size their cache by the memory used while loading the weights, so tables are allocated in that
        # phase.
        taken = allocated(self.device) - before + self.steerback.transient_bytes
        self.model_runner.model_memory_usage = getattr(self.model_runner, "model_memory_usage", 0) + taken
        if self.device.type != "cpu":
            torch.set_num_threads(1)  # with a thread per core the first tables after a pause took 40-105 ms, not 3
        return out

    def steerback_fetch(self, wanted: list[tuple[str, int]]) -> dict[str, list[Entry]]:
        """Return the results of finished requests; recordings come from the first worker only."""
        return self.steerback.fetch(wanted, records=self.rank == 0)

    def steerback_release(self, keys: list[str]) -> None:
        """Free the rows of aborted requests."""
        self.steerback.release(keys)

    def steerback_state(self) -> dict[str, str | int]:
        """Return the generation of the model runner, its device, and the free space of its tables."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"runner": generation(self.model_runner).name, "device": name, **self.steerback.state()}

    def steerback_memory(self) -> int:
        """Return the peak number of bytes in tensors on this device since the last call."""
        if self.device.type == "cpu":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def steerback_check(self, ticket: dict[str, str], seed: int) -> float:
        """Return the largest relative error of the tables' edits against `interventions.steer` on this device."""
        layers = decoder_layers(self.model_runner.get_model(), self.steerback.settings)
        return check_arithmetic(self.steerback, layers, ticket, seed)


def allocated(device: torch.device) -> int:
    """Return the number of bytes in tensors on a device (0 on a CPU, where vLLM gets a fixed amount)."""
    return 0 if device.type == "cpu" else torch.cuda.memory_allocated(device)


def install(runner: ModelRunner, settings: TableSettings, device: torch.device, first: bool) -> Slots:
    """Steer the loaded model of `runner`; the `first` worker also pools over the whole SAE."""
    generation(runner)  # raises for an unknown runner before any change
    layers = decoder_layers(runner.get_model(), settings)
    if not first:
        settings = replace(settings, poolers=0)
    sae = None if settings.sae is None else load_sae(settings.sae)  # stays on the CPU: columns move when used
    whole = None
    if sae is not None and (sae.kind == "topk" or settings.poolers):
        whole = replace(sae, W_dec=sae.W_dec[:0]).to(device, torch.float32)  # the whole encoder
    tokens, dtype = token_room(runner), runner.model_config.dtype
    shared = Shared.empty(settings, tokens, device)
    tables = {
        layer: LayerTable.empty(settings, device, tokens if layer in settings.pooled_layers else 0, dtype)
        for layer in settings.layers
    }
    for layer, table in tables.items():
        steer_layer(layers[layer], shared, table, settings, whole or sae)
    slots = Slots(settings, shared, tables, sae, load_directions(settings), whole)
    follow(runner, slots)
    return slots


@torch.inference_mode()
def check_arithmetic(slots: Slots, layers: nn.ModuleList, ticket: dict[str, str], seed: int, tokens: int = 12) -> float:
    """Send random residuals of one request through every edited layer; half of the positions are the prompt."""
    settings, shared = slots.settings, slots.shared
    draw = torch.Generator().manual_seed(seed)
    slots.admit([Arrival("steerback_check", ticket, tokens // 2, 0)])
    slots.step(EngineStep(["steerback_check"], np.array([tokens]), np.array([0])))
    edits = Ticket.from_args(ticket)
    worst = 0.0
    for layer in settings.layers:
        hidden, residual = torch.randn(2, tokens, settings.site.d_model, generator=draw)
        positions = torch.arange(tokens, device=shared.row.device)
        steered, arriving = layers[layer], hidden.to(positions.device)
        assert isinstance(steered, Steered)
        out = edit(steered, positions, arriving, residual.to(positions.device)) - arriving
        wanted = steer(
            (hidden + residual).double(),
            () if edits is None else edits.edits,
            layer,
            tokens // 2,
            settings.site,
            slots.sae,
            slots.directions,
        )
        delta = wanted - (hidden + residual).double()
        error = (out.cpu().double() - delta).abs().max() / delta.abs().max().clamp(min=1.0)
        worst = max(worst, float(error))
    slots.release([] if edits is None else [edits.key])
    slots.idle()
    return worst


def decoder_layers(model: nn.Module, settings: TableSettings) -> nn.ModuleList:
    """Return the list of decoder layers, independent of the attribute's name in the model class."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers"
        if len(module) == settings.site.n_layers and "vision" not in name
    ]
    if len(lists) != 1:
        raise SteerbackError(
            f"{type(model).__name__} has no single list of {settings.site.n_layers} decoder layers; "
            "this model class cannot be steered in vLLM, use --engine transformers"
        )
    return lists[0]


def load_directions(settings: TableSettings) -> dict[str, Tensor]:
    """Return the named directions."""
    if settings.directions is None:
        return {}
    from safetensors.torch import load_file

    return dict(load_file(settings.directions))
