"""Put a LoRA adapter beside a model's weights, and refuse one that does not fit them.

peft loads what fits and keeps quiet about the rest, so its account of missing and unexpected weights is checked here.
Module patterns of a configuration are regular expressions of somebody else's and could run for ever: the modules are
read from the names of the adapter's weights instead.
"""

from __future__ import annotations

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.engines.runner import CausalModel
from steerback.errors import SteerbackError, one_line
from steerback.targets.target import ADAPTER_FILES, Target, check_adapter

if TYPE_CHECKING:
    from peft import PeftConfig

REPEATED = re.compile(r"\)[*+?{]|(?:[*+{].*){4}", re.DOTALL)
"""A pattern with a repeated group, or with many repetitions: matching it can take exponential time."""


def with_adapter(target: Target, model: CausalModel) -> CausalModel:
    """Return the model with the target's LoRA adapter beside its weights, not merged into them."""
    if find_spec("peft") is None:
        raise SteerbackError(f"target {target.name!r} has an adapter: pip install 'steerback[finetune]'")
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    folder = Path(target.adapter or "")
    where = f"target {target.name!r}: cannot use adapter {folder}"
    check_adapter(where, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
            config = _without_patterns(PeftConfig.from_pretrained(str(folder)), folder, where)
            config.inference_mode = True
            adapted = PeftModel(model, config)
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})
            result = adapted.load_adapter(str(folder), "default", key_mapping=renamed)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise SteerbackError(f"{where}: {one_line(error)[:300]}") from error
    for keys, problem in (
        (result.missing_keys, "it lacks {} weights that its configuration names"),
        (result.unexpected_keys, "it has {} weights that the model has no place for"),
    ):
        if keys:
            raise SteerbackError(
                f"{where}: {problem.format(len(keys))}, the first is {min(keys)}; it belongs to another model or is "
                "incomplete"
            )
    steered: CausalModel = adapted.get_base_model()
    return steered


def _without_patterns(config: PeftConfig, folder: Path, where: str) -> PeftConfig:
    """Return a configuration whose modules are a list of names, never a pattern to be matched."""
    if config.is_prompt_learning:
        raise SteerbackError(f"{where}: {config.peft_type} is no adapter of weights; use LoRA")
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
