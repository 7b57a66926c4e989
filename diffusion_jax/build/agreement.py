"""Check that the parts of a model fit together, before anything starts."""

import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.core.schedules import Schedule
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.models.unet import UNet

CHECKED = 9  # levels at which two schedules are compared


def check_network(network: UNet | Transformer, channels: int, null_cond: PyTree) -> None:
    """Raise ValueError for a network that does not fit its data or its condition.

    network: that of config.model.
    channels: of x0, from the codec.
    null_cond: the condition of one image, leaves without the batch axis.
    """
    for field in ("in_channels", "out_channels"):
        value = getattr(network, field)
        if value != channels and not (value is None and network.in_channels == channels):
            raise ValueError(f"config.model.{field} must be {channels}, the channels of x0, got {value}")
    for leaf, (field, value) in network.CONDITION_FIELDS.items():
        if (leaf in null_cond) != (getattr(network, field) is not None):
            expected = value if leaf in null_cond else "None"
            raise ValueError(
                f"config.model.{field} must be {expected} for this config.condition, got {getattr(network, field)!r}"
            )
    for leaf in null_cond.keys() - network.reads.keys() - {"mask"}:
        raise ValueError(
            f"config.condition makes {leaf}, which no {type(network).__name__} reads; leave it out there, or choose "
            "another config.model.kind"
        )
    if "text" in null_cond and network.cross_attention_dim != null_cond["text"].shape[-1]:
        raise ValueError(
            f"config.model.cross_attention_dim must be {null_cond['text'].shape[-1]}, the width of the text encoder, "
            f"got {network.cross_attention_dim}"
        )


def check_updated(network: UNet | Transformer, teacher: str) -> None:
    """Raise ValueError if a LoRA of the teacher cannot give this network.

    teacher: the folder of the trained model.
    """
    if not teacher:
        raise ValueError("config.lora updates a trained model: set config.teacher to its folder")
    for field, disabled in (("target_embedding", False), ("time_cond_proj_dim", None)):
        if getattr(network, field) != disabled:
            raise ValueError(
                f"config.lora updates maps that the trained model has: set config.model.{field}={disabled}, got "
                f"{getattr(network, field)}"
            )


def condition_kind(null_cond: PyTree) -> str:
    """The kind of a condition: "none", "class" or "text".

    null_cond: "no condition" of a model.
    """
    kinds = {"text": "text", "label": "class"}
    return next((kind for leaf, kind in kinds.items() if leaf in null_cond), "none")


def has_text_encoders(config: ConfigDict) -> bool:
    """Whether the config names text encoders. Those of a checkpoint come with it."""
    return "condition" in config and config.condition.kind == "text"


def check_teacher(teacher: DiffusionModel, student: DiffusionModel) -> None:
    """Raise ValueError for a teacher whose outputs have another meaning than the student's."""
    for aspect, get in {
        "prediction": lambda model: model.parameterization,
        "shape of x0": lambda model: model.shape,
        "levels of its schedule": lambda model: _levels(model.useful_schedule),
        "condition": lambda model: _shapes(model.conditioning.null),
    }.items():
        teacher_value, student_value = get(teacher), get(student)
        if teacher_value != student_value:
            got = f": {teacher_value} there, {student_value} here" if aspect == "shape of x0" else ""
            raise ValueError(f"config.teacher differs from the model in its {aspect}{got}; give both the same config")


def _levels(schedule: Schedule) -> tuple:
    times = np.linspace(schedule.t_min, schedule.t_max, CHECKED)
    level = schedule(times)
    return tuple(np.round(np.arctan2(level.sigma, level.alpha), 5))


def _shapes(cond: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(leaf) for name, leaf in cond.items()}
