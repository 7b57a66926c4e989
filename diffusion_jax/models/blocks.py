"""One level of a U-Net or an autoencoder: residual blocks, attention between them, resampling at the end.

A block gets functions that build its submodules from a name, so it does not depend on sizes, norms or kinds of
attention. `resnet_inputs` are the inputs of every residual block besides the image.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp


class DownBlock(nn.Module):
    """`layers` residual blocks, each followed by optional attention, then optional downsampling.

    resnet, attention, downsample: functions from name to submodule, that of attention from (layer, name); the last two
      may be None.
    Returns the result and the skips for the upward half: one array for each layer, and the downsampled one.
    """

    layers: int
    resnet: Callable
    attention: Callable | None
    downsample: Callable | None

    @nn.compact
    def __call__(self, x, resnet_inputs, *context):
        skips = []
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i}")(x, *resnet_inputs)
            if self.attention:
                x = self.attention(i, name=f"attentions_{i}")(x, *context)
            skips.append(x)
        if self.downsample:
            x = self.downsample(name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """A residual block, then optional attention and a second residual block, unless `layers` is 1."""

    resnet: Callable
    attention: Callable | None
    layers: int = 2

    @nn.compact
    def __call__(self, x, resnet_inputs, *context):
        x = self.resnet(name="resnets_0")(x, *resnet_inputs)
        if self.layers == 1:
            return x
        if self.attention:
            x = self.attention(name="attentions_0")(x, *context)
        return self.resnet(name="resnets_1")(x, *resnet_inputs)


class UpBlock(nn.Module):
    """The mirror of `DownBlock`. Each residual block takes one skip from the end of the list."""

    layers: int
    resnet: Callable
    attention: Callable | None
    upsample: Callable | None

    @nn.compact
    def __call__(self, x, skips, resnet_inputs, *context):
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i}")(
                jnp.concatenate([x, skips.pop().astype(x.dtype)], axis=-1), *resnet_inputs
            )
            if self.attention:
                x = self.attention(i, name=f"attentions_{i}")(x, *context)
        if self.upsample:
            x = self.upsample(name="upsamplers_0")(x, skips[-1].shape[1:3])
        return x
