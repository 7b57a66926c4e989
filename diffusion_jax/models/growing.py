"""Larger U-Nets from trained ones: new outer levels for pictures of twice the size, around what is known already
(progressive growing, Karras et al. 2018).
"""

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree


def grown(inner: PyTree, outer: PyTree) -> PyTree:
    """The variables of a U-Net with a trained one inside; `inner` itself if it has as many levels.

    inner: variables of the trained network.
    outer: new variables of the larger one. Its outer levels have the width of the inner network's first one.

    A new level begins as the mean of four pixels on the way down and their copy on the way up: its shortcuts let pass
    what comes from inside, and its residual branches begin at zero, as everywhere. So at first the network says what
    the inner one says of pictures of half the size, but for edges.
    """
    added = _levels(outer) - _levels(inner)
    if added <= 0 or not _levels(inner):
        return inner
    known = flatten_dict({_moved(name, added): part for name, part in inner["params"].items()})
    made = dict(known)
    for path, leaf in flatten_dict(outer["params"]).items():
        if path not in known:
            made[path] = _first(path, np.asarray(leaf))
    return {"params": unflatten_dict(made)}


def _levels(variables: PyTree) -> int:
    return sum(name.startswith("down_blocks_") for name in variables["params"])


def _moved(name: str, added: int) -> str:
    """down_blocks_0 -> down_blocks_1, with one level outside it. Levels on the way up are counted from inside."""
    return re.sub(r"^down_blocks_(\d+)", lambda match: f"down_blocks_{int(match[1]) + added}", name)


def _first(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
    """What a variable of a new level begins as."""
    if path[-1] == "kernel" and {"downsamplers_0", "upsamplers_0", "conv_shortcut"} & set(path):
        made, same = np.zeros_like(leaf), np.eye(*leaf.shape[2:])
        if "downsamplers_0" in path:
            made[1:, 1:] = same / 4
        else:
            made[leaf.shape[0] // 2, leaf.shape[1] // 2] = same
        return made
    return leaf
