"""Larger U-Nets from trained ones: new outer levels for pictures of twice the size, around the trained levels
(progressive growing, Karras et al. 2018), and attention in levels that had none.
"""

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree


def grown(inner: PyTree, outer: PyTree) -> PyTree:
    """The variables of a U-Net with a trained one inside; `inner` itself if it has as many levels and attentions.

    inner: variables of the trained network.
    outer: new variables of the larger one. Its outer levels have the width of the inner network's first one.

    A new level starts as the mean of four pixels on the way down and as their copy on the way up. Its shortcuts pass
    the inner features through, and its residual branches start at zero, as everywhere. So at first the network predicts
    what the inner one predicts at half the size, for the same time, except at edges. For clean pictures this is right.
    For noisy ones it is only a start: the mean of four pixels has half of the noise that belongs to the time
    (Hoogeboom et al. 2023, section 3.1), and the new levels have yet to learn the noise within the four.
    Attention in a trained level that had none starts at zero too, so it changes nothing at first.
    """
    added = _levels(outer) - _levels(inner)
    if added < 0 or not _levels(inner):
        return inner
    trained = flatten_dict({_shifted_name(name, added): part for name, part in inner["params"].items()})
    new = {
        path: _initial_value(path, leaf)
        for path, leaf in flatten_dict(outer["params"]).items()
        if path not in trained and (added or any(name.startswith("attentions_") for name in path))
    }
    return {"params": unflatten_dict(trained | new)} if new else inner


def _levels(variables: PyTree) -> int:
    return sum(name.startswith("down_blocks_") for name in variables["params"])


def _shifted_name(name: str, added: int) -> str:
    """down_blocks_0 -> down_blocks_1, with one level outside it. Levels on the way up are counted from inside."""
    return re.sub(r"^down_blocks_(\d+)", lambda match: f"down_blocks_{int(match[1]) + added}", name)


def _initial_value(path: tuple[str, ...], leaf: Array | np.ndarray) -> Array | np.ndarray:
    """The initial value of a variable of a new level. leaf: the random one, of which only the shape may be known."""
    if path[-1] == "kernel" and {"downsamplers_0", "upsamplers_0", "conv_shortcut"} & set(path):
        kernel, identity = np.zeros(leaf.shape, leaf.dtype), np.eye(*leaf.shape[2:])
        if "downsamplers_0" in path:
            kernel[1:, 1:] = identity / 4
        else:
            kernel[leaf.shape[0] // 2, leaf.shape[1] // 2] = identity
        return kernel
    return leaf
