"""LPIPS, a distance between images in the features of a classifier.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1:

    d(x, y) = sum_l mean_hw sum_c  w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

f_l: features after stage l of AlexNet or VGG16; |f_l|: their norm over channels; w_l >= 0: learned weights of channels.
Version 0.1 of the published weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPS = 1e-10
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for images in [-1, 1]


class Net(NamedTuple):
    """A classifier up to its last convolution.

    stages: (stride, padding) of each convolution of each stage.
    pool: window of the max pooling before each stage, with stride 2. 0 for none.
    smallest: smallest image, in pixels on a side, that reaches the last stage.
    """

    stages: tuple[tuple[tuple[int, int], ...], ...]
    pool: tuple[int, ...]
    smallest: int


NETS = {
    "AlexNet_0": Net((((4, 2),), ((1, 2),), ((1, 1),), ((1, 1),), ((1, 1),)), (0, 3, 3, 0, 0), 31),
    "VGG16_0": Net(tuple(((1, 1),) * convolutions for convolutions in (2, 2, 3, 3, 3)), (0, 2, 2, 2, 2), 16),
}


def lpips(
    params: dict, x: Float[Array, "batch height width 3"], y: Float[Array, "batch height width 3"]
) -> Float[Array, "batch"]:
    """The distance of each pair: 0 for equal images, about 0.1 for similar and 0.7 for different ones.

    params: from `interop.lpips.load_lpips`.
    x, y: images in [-1, 1], at least 31 pixels high and wide for AlexNet, 16 for VGG16.
    Raises ValueError for smaller images.
    """
    total = jnp.zeros(len(x))
    for stage, both in enumerate(features(params, jnp.concatenate([x, y]))):
        unit_x, unit_y = jnp.split(both / _norm(both), 2)
        weights = params[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"][0, 0, :, 0]
        total += jnp.mean((unit_x - unit_y) ** 2 @ weights, axis=(1, 2))
    return total


def _norm(features: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width 1"]:
    # The constant is inside the root: the gradient is then finite where all features are 0, as on plain white.
    return jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True) + EPS**2)


def features(params: dict, images: Float[Array, "batch height width 3"]) -> list[Float[Array, "batch h w channels"]]:
    """The features of images after each stage of the classifier.

    params, images: as in `lpips`.
    Raises ValueError for images that are too small.
    """
    name = next(name for name in NETS if name in params)
    net = NETS[name]
    height, width = images.shape[1:3]
    if min(height, width) < net.smallest:
        raise ValueError(f"LPIPS with {name} needs {net.smallest} or more pixels a side, got {height}x{width}")
    x = (images - jnp.array(MEAN)) / jnp.array(DEVIATION)
    layers = (params[name][f"Conv_{i}"] for i in range(len(params[name])))
    stages = []
    for convolutions, window in zip(net.stages, net.pool, strict=True):
        if window:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), "VALID")
        for (stride, padding), layer in zip(convolutions, layers, strict=False):
            x = lax.conv_general_dilated(
                x,
                layer["kernel"],
                window_strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + layer["bias"])
        stages.append(x)
    return stages
