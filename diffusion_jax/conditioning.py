"""The condition of a denoiser: none, a class, or a text."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from diffusion_jax.data.transforms import Record
from diffusion_jax.models.text import TextEncoder


class Conditioning(NamedTuple):
    """Records and prompts -> the condition of the denoiser.

    cache_key: () -> identifies the weights, part of the key of cached records; "" if caching does not pay.
    of_records: stacked records -> cond, leaves (B, ...).
    of_prompts: prompts -> cond, leaves (B, ...).
    null: "no condition"; leaves without the batch axis.
    """

    cache_key: Callable[[], str]
    of_records: Callable[[Record], PyTree]
    of_prompts: Callable[[Sequence[str]], PyTree]
    null: PyTree


def unconditional() -> Conditioning:
    """No condition. The number of prompts sets the number of images."""
    return Conditioning(lambda: "", lambda records: {}, lambda prompts: {}, {})


def class_labels(num_classes: int) -> Conditioning:
    """Class numbers 0..num_classes-1, also as prompts. The null class is num_classes."""

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        wrong = [p for p in prompts if not (p.isascii() and p.strip().isdecimal() and int(p) < num_classes)]
        if wrong:
            raise ValueError(f"this model knows classes: expected a number in 0..{num_classes - 1}, got {wrong[0]!r}")
        return {"label": np.array([int(p) for p in prompts], np.int32)}

    return Conditioning(
        lambda: "", lambda records: {"label": records["label"]}, of_prompts, {"label": np.int32(num_classes)}
    )


def text(encoder: TextEncoder) -> Conditioning:
    """Captions through a text encoder: an embedding for each token and the mask of tokens. null is the empty prompt."""
    embed = jax.jit(encoder.apply)

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        ids, mask = encoder.tokenize(prompts)
        return {"text": np.asarray(embed(encoder.params, ids, mask)), "mask": mask}

    return Conditioning(
        cache_key=lambda: encoder.name,
        of_records=lambda records: of_prompts(list(records["caption"])),
        of_prompts=of_prompts,
        null=jax.tree.map(lambda leaf: leaf[0], of_prompts([""])),
    )
