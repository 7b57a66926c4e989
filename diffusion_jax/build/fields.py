"""The fields of a config, by section, and the check of a config before anything starts.

`sections` has the tables of fields. The names of solvers, schedules and so on are checked by building what they name.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.build.ranges import Check, each, flag, fraction, levels, number, optional, positive, whole
from diffusion_jax.build.sections import (
    AUTOENCODER,
    CONDITION,
    DATA,
    EVAL,
    LORA,
    LOSS,
    OBJECTIVE,
    OPTIMIZER,
    PUBLISHED,
    RUN,
    SAMPLE,
    SCHEDULE,
    SEEDS,
    SERVE,
    SPLITS,
    TRAIN,
    TRAINED,
    Field,
)

MAX_SHOWN = 120  # characters of a wrong value in a message

# the classes of networks, such as `models.unet.UNet`, have the defaults and meaning of their fields
NETWORK: dict[str, Check] = {
    "in_channels": whole(1),
    "out_channels": whole(1),
    "latent_channels": whole(1),
    "block_out_channels": levels(whole(1)),
    "layers_per_block": levels(whole(1)),
    "transformer_layers_per_block": levels(whole(1)),
    "attention_head_dim": optional(levels(whole(1))),
    "norm_num_groups": whole(1),
    "attn_norm_num_groups": optional(whole(1)),
    "norm_eps": positive,
    "dropout": fraction,
    "downsample_padding": whole(0, 1),
    "freq_shift": number(0),
    "time_embedding_dim": optional(whole(1)),
    "cross_attention_dim": optional(whole(1)),
    "num_class_embeds": optional(whole(1)),
    "num_embeds_ada_norm": optional(whole(1)),
    "addition_time_embed_dim": optional(whole(1)),
    "projection_class_embeddings_input_dim": optional(whole(1)),
    "time_cond_proj_dim": optional(whole(2)),
    "target_embedding": flag,
    "interval_embedding": flag,
    "time_smoothing": number(0),
    "sample_size": optional(levels(whole(1))),
    "patch_size": whole(1),
    "num_layers": whole(1),
    "num_attention_heads": whole(1),
    "attention_bias": flag,
    "norm_elementwise_affine": flag,
    "mlp_ratio": positive,
    "axes_dims_rope": each(whole(2)),
    "rope_theta": positive,
    "remat": flag,
    "scan": flag,
    "scaling_factor": positive,
    "shift_factor": optional(number()),
}


COMPLETE_SECTIONS = {  # sections that must have all of their fields if they exist
    "data": DATA,
    "data.splits": SPLITS,
    "autoencoder.loss": LOSS,
    "autoencoder.optimizer": OPTIMIZER,
    "autoencoder.train": TRAIN,
    "schedule": SCHEDULE,
    "optimizer": OPTIMIZER,
    "train": TRAIN,
    "sample": SAMPLE,
    "eval": EVAL,
    "serve": SERVE,
    "lora": LORA,
}
TABLES = {
    "": RUN | TRAINED | PUBLISHED,
    "condition": CONDITION,
    "autoencoder": AUTOENCODER,
    "objective": OBJECTIVE,
} | COMPLETE_SECTIONS
CHECKS = {path: {name: field.check for name, field in table.items()} for path, table in TABLES.items()} | {
    "model": NETWORK,
    "autoencoder.model": NETWORK | {"patch_size": optional(each(whole(1), 2))},
}
REQUIRED_BY_KIND = {  # section -> kind -> fields that it must have
    "condition": {"class": ("num_classes",), "text": ("length",)},
    "autoencoder": {"kl": ("checkpoint", "model")},
}
TRAINED_FIRST_STAGE = ("flip", "loss", "optimizer", "train")  # fields of an autoencoder that has the last


def section(table: dict[str, Field], **values: Any) -> ConfigDict:
    """The section that a table describes.

    values: instead of the defaults.
    """
    defaults = {name: field.default() if callable(field.default) else field.default for name, field in table.items()}
    return ConfigDict(defaults | values)


def completed(config: ConfigDict) -> ConfigDict:
    """The config with defaults for missing fields, because a config.json of an earlier version lacks newer fields."""
    top = RUN | (PUBLISHED if "checkpoint" in config else TRAINED)
    sections = {name: section(table, **config[name]) for name, table in TABLES.items() if name in config}
    return section(top, **dict(config) | sections)


def check(config: ConfigDict) -> None:
    """Raise ValueError for the first field that is missing or out of range, and for fields that exclude each other.

    config: as the files in `configs/` return it. Fields and sections that are in no table are not checked.
    """
    _check_complete(config)
    for path, checks in CHECKS.items():
        values = _find(config, path)
        for name, check_field in checks.items():
            must_be = check_field(values[name]) if name in values else ""
            if must_be:
                where = ".".join(filter(None, ("config", path, name)))
                raise ValueError(f"{where} must be {must_be}, got {repr(values[name])[:MAX_SHOWN]}")
    _check_seeds(_find(config, "sample"))
    _check_condition(_find(config, "condition"), _find(config, "model"))
    if "checkpoint" not in config and _find(config, "data").get("size") == 0:
        raise ValueError("config.data.size must be in [8, 8192], got 0, which needs a config.checkpoint")


def _find(config: ConfigDict, path: str) -> ConfigDict:
    """The section at a dotted path; an empty one if the config has none."""
    current = config
    for name in filter(None, path.split(".")):
        current = current.get(name, ConfigDict())
        if not isinstance(current, ConfigDict):
            raise ValueError(f"config.{path} must be a section with fields, got {repr(current)[:MAX_SHOWN]}")
    return current


def _check_complete(config: ConfigDict) -> None:
    for path in [*COMPLETE_SECTIONS, *REQUIRED_BY_KIND]:
        values = _find(config, path)
        kind = values.get("kind")
        needed = COMPLETE_SECTIONS[path] if path in COMPLETE_SECTIONS else REQUIRED_BY_KIND[path].get(kind, ())
        if path == "autoencoder" and kind == "kl" and "train" in values:
            needed += TRAINED_FIRST_STAGE
        missing = [name for name in needed if name not in values]
        if values and missing:
            of_kind = f" for kind={kind}" if kind else ""
            raise ValueError(
                f"config.{path} must have the field {missing[0]}{of_kind}, got only {', '.join(values)}; add it in the "
                "config file"
            )


def _check_seeds(sample: ConfigDict) -> None:
    seed, images = sample.get("seed", 0), sample.get("num_images", 1)
    if seed + images > SEEDS:
        raise ValueError(
            f"config.sample.seed must be at most {SEEDS - images} for {images} images of a prompt, "
            f"whose seeds count up from it, got {seed}"
        )


def _check_condition(condition: ConfigDict, model: ConfigDict) -> None:
    for name, more in (("num_class_embeds", 1), ("num_embeds_ada_norm", 0)):
        table = model.get(name)
        if condition.get("kind") == "class" and table is not None and table < condition.num_classes + more:
            raise ValueError(
                f"config.model.{name} must be at least {condition.num_classes + more}, one for each of "
                f"condition.num_classes={condition.num_classes}{' and one for no condition' * more}, got {table}"
            )
