"""A U-Net as the function that training and sampling call."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PyTree

from diffusion_jax.models.unet import UNet

ARGUMENTS = {"text": "encoder_hidden_states", "mask": "encoder_attention_mask", "label": "class_labels"}


@dataclass(frozen=True)
class Denoiser:
    """apply(params, x, t, cond, keys=None) -> output; with keys, dropout is on. Equal for equal networks, so that what
    was compiled for one serves the other.

    cond: any of {"text": (B, L, D), "mask": (B, L), "label": (B,)}, of SDXL "text_embeds" and "time_ids" (see
    `UNet.__call__`), and "known": (B, h, w, k), channels that the network sees after those of x.
    """

    unet: UNet

    def __call__(
        self,
        params: PyTree,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "batch"],
        cond: PyTree,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        inputs = {ARGUMENTS.get(name, name): leaf for name, leaf in cond.items()}
        if "known" in inputs:
            x = jnp.concatenate([x, inputs.pop("known")], axis=-1)
        return self.unet.apply(params, x, t, **inputs, keys=keys)
