"""The settings of an adapter as peft writes them: LoraConfig, LoHaConfig and LoKrConfig.

They stand in the header of a .safetensors file under "lora_adapter_metadata", flat, with the part of the pipeline
before each name (diffusers), or in adapter_config.json beside adapter_model.safetensors (peft).
"""

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from diffusion_jax import paths
from diffusion_jax.interop.tensors import read_json, read_metadata
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path

HEADER = "lora_adapter_metadata"
# Which maps are trained, how the factors began and how they were trained: the factors themselves tell the result.
WITHOUT_EFFECT = {
    "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",  # read below
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout",
    "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "decompose_both",
    "decompose_factor", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "auto_mapping", "task_type",
    "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
# Initial factors that leave the weights of the model as they are. Others, such as PiSSA, are subtracted from them.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "lycoris")
SUPPORTED = {
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "bias": ("none",),
    "init_lora_weights": PLAIN_STARTS,
    "init_weights": PLAIN_STARTS,
}


class Settings(NamedTuple):
    """What the settings of one part say about the numbers of its updates.

    alpha, rank: of every map that the patterns do not name.
    alpha_pattern, rank_pattern: regular expression for the end of a map's path -> its value.
    rank_stabilized: the scale is alpha / sqrt(rank) instead of alpha / rank.
    is_dora: whether the updates have magnitudes, None if the settings do not say it.
    """

    alpha: float
    rank: int
    alpha_pattern: Mapping[str, float] = MappingProxyType({})
    rank_pattern: Mapping[str, int] = MappingProxyType({})
    rank_stabilized: bool = False
    is_dora: bool | None = None

    def of(self, path: str) -> tuple[float, int]:
        """(alpha, rank) of the map at a path with dots."""
        return _matching(self.alpha_pattern, path, self.alpha), _matching(self.rank_pattern, path, self.rank)


def read_settings(path: str | Path, default_part: str) -> dict[str, Settings]:
    """The settings of a file of updates by part of the pipeline; none if it has none.

    default_part: the part that settings without a part are for.
    Raises ValueError for settings that are malformed, unknown, or change the numbers in a way that is not supported.
    """
    path = paths.at(path)
    beside, source = path.with_name("adapter_config.json"), path
    try:
        content = json.loads(read_metadata(path).get(HEADER) or "{}") if path.suffix == ".safetensors" else {}
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed {HEADER} in its header: {first_line(error)}") from None
    if not content and path.stem == "adapter_model" and beside.is_file():
        content, source = read_json(beside), beside
    fields: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, name = key.rpartition(".")
        fields.setdefault(part or default_part, {})[name] = value
    return {part: _settings(values, source) for part, values in fields.items()}


def _settings(fields, source):
    for name, value in sorted(fields.items(), key=lambda field: field[0] != "peft_type"):  # the kind says the most
        if value is None or value is False or value in ("", [], {}):
            continue
        if name in SUPPORTED and value not in SUPPORTED[name]:
            expected = ", ".join(map(str, SUPPORTED[name]))
            raise ValueError(f"{source}: its setting {name} is {value!r}; supported: {expected}")
        if name not in WITHOUT_EFFECT | SUPPORTED.keys():
            raise ValueError(f"{source}: its setting {name} = {value!r} is not supported")
    alpha = "alpha" if "alpha" in fields and "lora_alpha" not in fields else "lora_alpha"
    try:
        return Settings(
            alpha=_alpha(alpha, fields.get(alpha, 8)),  # 8 is the default of peft
            rank=_rank("r", fields.get("r", 8)),
            alpha_pattern=_pattern(fields, "alpha_pattern", _alpha),
            rank_pattern=_pattern(fields, "rank_pattern", _rank),
            rank_stabilized=_flag(fields, "use_rslora"),
            is_dora=_flag(fields, "use_dora") if "use_dora" in fields else None,
        )
    except ValueError as error:
        raise ValueError(f"{source}: malformed settings of its adapter: {error}") from None


def _alpha(name, value):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _rank(name, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number, at least 1, got {value!r}")
    return value


def _pattern(fields, name, number):
    values = fields.get(name) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected an object from maps to numbers, got {values!r}")
    return {key: number(f"{name} of {key}", value) for key, value in values.items()}


def _flag(fields, name):
    value = fields.get(name) or False
    if value not in (True, False):
        raise ValueError(f"{name}: expected true or false, got {value!r}")
    return value


def _matching(pattern, path, default):
    """The value of the first key that matches the end of a path, as peft reads such patterns."""
    try:
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
    except re.error as error:
        raise ValueError(f"malformed pattern of maps in its settings: {first_line(error)}") from None
