"""Variables of equal layers as one array each, (layers, ...), as `nn.scan` takes them.

A module whose name ends in EACH has the variables of all layers of a list. Everywhere else, in files above all, each
layer has a name of its own: `transformer_blocks_each` is transformer_blocks_0, transformer_blocks_1, ….
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

EACH = "_each"

Path = tuple[str, ...]


def through(blocks: Sequence[nn.Module] | nn.Module, count: int, carry: PyTree, *inputs: PyTree) -> PyTree:
    """The carry after `count` equal blocks, each called as block(carry, *inputs).

    blocks: all of them, or one module, which is compiled once for all and whose variables are then stacked.
    """
    if isinstance(blocks, nn.Module):
        one_after_the_other = nn.scan(
            lambda block, carry, _: (block(carry, *inputs), None),
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=count,
        )
        return one_after_the_other(blocks, carry, None)[0]
    for block in blocks:
        carry = block(carry, *inputs)
    return carry


def is_stacked(path: Path) -> bool:
    """Whether the variable at this path has a leading axis of layers."""
    return any(name.endswith(EACH) for name in path)


def layers(path: Path, leaf: Any) -> Iterator[tuple[Path, Any]]:
    """The path and the variable of every layer: one pair, unless the variable `is_stacked`.

    leaf: an array or its shape (`jax.ShapeDtypeStruct`).
    """
    if not is_stacked(path):
        yield path, leaf
        return
    for i in range(leaf.shape[0]):
        part = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]
        yield tuple(f"{name.removesuffix(EACH)}_{i}" if name.endswith(EACH) else name for name in path), part


def mapped(function: Callable[[Path, Any], np.ndarray], path: Path, leaf: Any) -> np.ndarray:
    """function(path, leaf), an array of numpy, of every layer, stacked as the variable is."""
    results = [function(*layer) for layer in layers(path, leaf)]
    return np.stack(results) if is_stacked(path) else results[0]
