"""The patch discriminator of an adversarial loss."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.models.layers import GroupNorm


class PatchDiscriminator(nn.Module):
    """Tell real patches from generated ones: one logit for each overlapping patch (Isola et al. 2017, section 3.2.2).

    4x4 convolutions with leaky ReLU. Group norm replaces the batch norm of the paper, so that the logits of an image do
    not depend on the other images of its batch.

    channels: of the first layer. Each layer doubles them, up to 8 times as many.
    layers: number of layers that halve the image. Three give a patch of 70x70 pixels.
    """

    channels: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> Float[Array, "batch h w"]:
        smallest = 3 * 2**self.layers  # the last two convolutions remove one pixel each
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchDiscriminator: expected images of at least {smallest}x{smallest} pixels, got shape "
                f"{x.shape}; turn the adversarial loss off or use fewer layers"
            )
        conv = functools.partial(
            nn.Conv, kernel_size=(4, 4), padding=1, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02)
        )
        for i in range(self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = conv(self.channels * min(2**i, 8), strides=stride)(x)
            if i > 0:
                x = GroupNorm(groups=self.channels // 4, eps=1e-5)(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1)(x)[..., 0].astype(jnp.float32)

    def example_image(self) -> Float[Array, "1 height width 3"]:
        """The smallest valid input of `init`, all zeros."""
        smallest = 3 * 2**self.layers
        return jnp.zeros((1, smallest, smallest, 3))
