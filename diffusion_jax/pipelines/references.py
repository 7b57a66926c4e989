"""Pictures that a prompt refers to, as a part of its condition."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8

from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import encode_any


def with_references(model: DiffusionModel, cond: PyTree, pictures: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> PyTree:
    """The condition with reference pictures, which the prompt can say to change or to combine.

    Every pipeline takes it. Guidance keeps the pictures: only the prompt differs between its two branches.

    cond: leaves (B, ...), of prompts.
    pictures: each (1 or B, H, W, 3), uint8, one for all images or one for each. Sizes may differ between pictures;
      `model.references` says which are read, and how others are resized and cropped.
    Raises ValueError for more pictures than the model reads, and for sizes that it does not read.
    """
    model.references.check(len(pictures))
    if not pictures:
        return cond
    count = len(jax.tree.leaves(cond)[0])
    fitted = [np.stack([model.references.fitted(picture, model.cell) for picture in each]) for each in pictures]
    latents = [encode_any(model.codec, each) for each in fitted]
    return cond | {"references": tuple(jnp.broadcast_to(x0, (count, *x0.shape[1:])) for x0 in latents)}
