"""Load a LoRA adapter without merging it into the model's weights, and refuse an adapter that does not fit.

peft loads the weights that match and ignores the others, so this module checks its lists of missing and unexpected
weights. Module patterns in an adapter's configuration are untrusted regular expressions that may never finish. The
modules are therefore taken from the names of the adapter's weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError, one_line
from steerback.readers import Json, read_safetensors_header, reason_of
from steerback.targets.target import ADAPTER_FILES, Target, adapter_config, check_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.nn import Module
    from transformers import PreTrainedModel

REPEATED = re.compile(r"\)[*+?{]|(?:[*+{].*){4}", re.DOTALL)
"""Matches patterns with a repeated group or many repetitions, which can take exponential time."""

CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the model's own weights. vLLM ignores them, so the engines would differ."""
HIGHEST_RANK = 10_000


def with_adapter(target: Target, model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the target's LoRA adapter loaded, not merged."""
    if find_spec("peft") is None:
        raise SteerbackError(f"target {target.name!r} has an adapter: pip install 'steerback[finetune]'")
    from peft import PeftConfig, PeftModel

    folder = Path(target.adapter or "")
    where = f"target {target.name!r}: cannot use adapter {folder}"
    check_fits(where, folder, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated function of transformers
            config = _without_patterns(PeftConfig.from_pretrained(str(folder)), folder, where)
            config.inference_mode = True
            adapted = PeftModel(model, config)
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})
            result = adapted.load_adapter(str(folder), "default", key_mapping=renamed)
    except SteerbackError:
        raise
    except Exception as error:  # a wrong value raises errors of many types in peft
        raise SteerbackError(f"{where}: {type(error).__name__}: {reason_of(error)}") from error
    for keys, problem in (
        (result.missing_keys, "it lacks {} weights that its configuration names"),
        (result.unexpected_keys, "it has {} weights for modules that the model lacks"),
    ):
        if keys:
            raise SteerbackError(
                f"{where}: {problem.format(len(keys))}, the first is {min(keys)}; it belongs to another model or is "
                "incomplete"
            )
    steered: PreTrainedModel = adapted.get_base_model()
    return steered


def check_fits(where: str, folder: Path, model: PreTrainedModel) -> None:
    """Raise SteerbackError if an adapter does not fit a model: unknown modules, wrong shapes or missing weights.

    Reads only the header of the adapter file, so the model may be on the meta device, without weights.
    """
    check_adapter(where, folder)
    if refused := _refused(adapter_config(folder)):
        raise SteerbackError(f"{where}: it {refused}")
    modules = {name: module for name, module in model.named_modules() if name}
    renamed: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})
    parts: dict[str, dict[str, list[int]]] = {}
    for key, entry in read_safetensors_header(folder / ADAPTER_FILES[1], "adapter weights").items():
        if key == "__metadata__":
            continue
        name, lora, part = key.removeprefix("base_model.model.").partition(".lora_")
        name = name if lora else name.rpartition(".")[0].removesuffix(".base_layer")  # stored in full
        if name not in modules:
            name = next((n for old, new in renamed.items() if (n := re.sub(old, new, name)) in modules), name)
        shape = entry.get("shape")
        parts.setdefault(name, {})[part] = [n for n in shape if isinstance(n, int)] if isinstance(shape, list) else []
    misfit = next(
        (f"has weights of {one_line(name)[:200]}, which the model lacks" for name in parts if name not in modules),
        None,
    )
    misfit = misfit or next((_misfit(name, own, modules[name]) for name, own in parts.items()), None)
    missing = [name for name in modules if name not in parts and _is_meant(name, modules[name], adapter_config(folder))]
    if misfit is None and missing:
        misfit = f"lacks weights of {len(missing)} modules that its configuration names, the first is {min(missing)}"
    if misfit is not None:
        raise SteerbackError(f"{where}: it {misfit}; it belongs to another model or is incomplete")


def _refused(config: Mapping[str, Json]) -> str | None:
    """Return why a configuration is refused whatever its weights are, or None. peft would apply it for hours."""
    start, ranks = str(config.get("init_lora_weights")), config.get("rank_pattern")
    if start.startswith(CHANGING):
        return f"needs a model whose weights its initialisation {start[:40]!r} has changed; save it as plain LoRA"
    if config.get("layer_replication"):
        return "repeats layers of the model (layer_replication), which is not supported"
    named = [config.get("r"), *(ranks.values() if isinstance(ranks, dict) else ())]
    if any(isinstance(rank, int) and rank > HIGHEST_RANK for rank in named):
        return f"has a rank above {HIGHEST_RANK:,}"
    return None


def _misfit(name: str, parts: Mapping[str, list[int]], module: Module) -> str | None:
    """Return why the matrices of one module do not fit, or None. A has shape (rank, inputs), B (outputs, rank)."""
    a, b = parts.get("A.weight"), parts.get("B.weight")
    if (a is None) != (b is None):
        return f"has one of the two matrices of {name}"
    wide, high = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if a is None or b is None or wide is None:
        return None
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != (high, wide):
        return f"has matrices {b} and {a} for {name}, whose weight is {[high, wide]}"
    return None


def _is_meant(name: str, module: Module, config: Mapping[str, Json]) -> bool:
    """Return whether the configuration lists this module by name."""
    wanted, excluded, layers = (config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    excluded = excluded or []
    if not isinstance(wanted, list) or not isinstance(excluded, list) or not hasattr(module, "in_features"):
        return False
    if layers is not None:
        own = re.search(r"\.(\d+)\.", name)
        chosen = layers if isinstance(layers, list) else [layers]
        if own is None or int(own[1]) not in chosen:
            return False
    ends = [any(f".{name}".endswith(f".{end}") for end in ends) for ends in (wanted, excluded)]
    return ends == [True, False]


def _without_patterns(config: PeftConfig, folder: Path, where: str) -> PeftConfig:
    """Return the configuration with its module patterns replaced by a list of names."""
    if config.is_prompt_learning:
        raise SteerbackError(f"{where}: {config.peft_type} is not a weight adapter; use LoRA")
    patterned = isinstance(config.target_modules, str) and config.target_modules != "all-linear"
    if patterned or isinstance(config.exclude_modules, str) or config.layers_pattern:
        from safetensors import safe_open

        with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as file:
            names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
        config.target_modules = names
        config.exclude_modules = config.layers_pattern = config.layers_to_transform = None
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        for pattern in getattr(config, field, None) or ():
            if REPEATED.search(pattern):
                raise SteerbackError(f"{where}: {field} {pattern[:80]!r} is too costly to match; name the modules")
    return config
