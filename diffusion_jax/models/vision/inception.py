"""Inception-v3 as the Frechet Inception distance uses it (Szegedy et al. 2015; Heusel et al. 2017).

The graph of 2015-12-05 differs from the paper and from later networks of the name: averages over 3 x 3 pixels leave out
the border, the last block takes the maximum instead, images are resized as in TensorFlow 1, and there are 1,008
classes. Layer names are those of torch-fidelity and pytorch-fid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

SIDE = 299
EPS = 1e-3  # of batch normalization


class InceptionFeatures(NamedTuple):
    """What metrics use.

    pooled: mean over the last pixels, for Frechet and kernel distances.
    logits: of 1,008 classes without the bias, for the Inception Score.
    """

    pooled: Float[Array, "batch 2048"]
    logits: Float[Array, "batch 1008"]


class Block(NamedTuple):
    """Branches that all take the block's input. Their outputs are concatenated.

    branches: the convolutions of each, by name. Convolutions in a tuple take the same input and are concatenated.
    pool: "average", "maximum" or "halved", the maximum of every other pixel; a convolution named branch_pool follows
      unless halved. A halving block also halves at the end of each branch.
    """

    branches: tuple[tuple[str | tuple[str, ...], ...], ...]
    pool: str


def _chain(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i + 1}" for i in range(count))


A = Block((("branch1x1",), _chain("branch5x5", 2), _chain("branch3x3dbl", 3)), "average")
B = Block((("branch3x3",), _chain("branch3x3dbl", 3)), "halved")
C = Block((("branch1x1",), _chain("branch7x7", 3), _chain("branch7x7dbl", 5)), "average")
D = Block((_chain("branch3x3", 2), _chain("branch7x7x3", 4)), "halved")
E = Block(
    (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        (*_chain("branch3x3dbl", 2), ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    ),
    "average",
)
BLOCKS = {
    **{f"Mixed_5{letter}": A for letter in "bcd"},
    "Mixed_6a": B,
    **{f"Mixed_6{letter}": C for letter in "bcde"},
    "Mixed_7a": D,
    "Mixed_7b": E,
    "Mixed_7c": E._replace(pool="maximum"),
}


def inception(params: dict, images: UInt8[Array, "batch height width 3"]) -> InceptionFeatures:
    """The features of images of any size.

    params: name of a convolution -> {"kernel": (H, W, in, out), "bias": (out,)}, batch normalization folded in, and
      "fc" -> {"kernel": (2048, classes)}; from `interop.inception.load_inception`.
    """
    x = (_resized(images.astype(jnp.float32)) - 128) / 128

    def convolve(name: str, x: Array, stride: int = 1, padding: str = "SAME") -> Array:
        layer = params[name]
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, layer["kernel"], (stride, stride), padding, dimension_numbers=dimensions)
        return jax.nn.relu(x + layer["bias"])

    x = convolve("Conv2d_1a_3x3", x, 2, "VALID")
    x = convolve("Conv2d_2a_3x3", x, padding="VALID")
    x = _halved(convolve("Conv2d_2b_3x3", x))
    x = convolve("Conv2d_3b_1x1", x)
    x = _halved(convolve("Conv2d_4a_3x3", x, padding="VALID"))
    for name, block in BLOCKS.items():
        x = _block(block, name, x, convolve)
    pooled = x.mean(axis=(1, 2))
    return InceptionFeatures(pooled, pooled @ params["fc"]["kernel"])


def _block(block: Block, name: str, x: Array, convolve) -> Array:
    outputs, halves = [], block.pool == "halved"
    for branch in block.branches:
        y = x
        for layer in branch[:-1]:
            y = convolve(f"{name}.{layer}", y)
        last = branch[-1] if isinstance(branch[-1], tuple) else (branch[-1],)
        outputs += [convolve(f"{name}.{layer}", y, *((2, "VALID") if halves else ())) for layer in last]
    if halves:
        return jnp.concatenate([*outputs, _halved(x)], axis=-1)
    pooled = _average(x) if block.pool == "average" else _pool(x, -jnp.inf, lax.max)
    return jnp.concatenate([*outputs, convolve(f"{name}.branch_pool", pooled)], axis=-1)


def _pool(x: Array, initial: float, reduce, stride: int = 1, padding: str = "SAME") -> Array:
    return lax.reduce_window(x, initial, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _halved(x: Array) -> Array:
    return _pool(x, -jnp.inf, lax.max, 2, "VALID")


def _average(x: Array) -> Array:
    """The mean of each pixel's neighbours inside the image."""
    return _pool(x, 0.0, lax.add) / _pool(jnp.ones_like(x[:1, :, :, :1]), 0.0, lax.add)


def _resized(images: Float[Array, "batch height width 3"]) -> Float[Array, "batch 299 299 3"]:
    """Bilinear as in TensorFlow 1: output pixel i is at i · side / 299, the image's first pixel stays the first."""
    rows, columns = (jnp.asarray(_interpolation_weights(side), images.dtype) for side in images.shape[1:3])
    precise = lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, images, precision=precise)


def _interpolation_weights(side: int) -> np.ndarray:
    """(299, side): the weights of the two pixels around each output pixel."""
    position = np.arange(SIDE, dtype=np.float32) * (np.float32(side) / np.float32(SIDE))
    left = np.floor(position).astype(int)
    weights = np.zeros((SIDE, side), np.float32)
    numbers, fraction = np.arange(SIDE), position - left
    np.add.at(weights, (numbers, left), 1 - fraction)
    np.add.at(weights, (numbers, np.minimum(left + 1, side - 1)), fraction)
    return weights
