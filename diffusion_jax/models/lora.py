"""Low-rank updates of a network's linear maps and convolutions, trained instead of them (LoRA, Hu et al. 2021).

    y = W x + (alpha / rank) up (down x),    down (in, rank) normal, up (rank, out) zero at first

For a convolution, down is a convolution of the same size, (h, w, in, rank). Stacked maps (`models.stacking`) have
stacked updates. The layers add the updates if the variables have a collection "lora".
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from diffusion_jax.models.stacking import is_stacked

ATTENTION = r"(attn[12]?|attention)/(to_(q|k|v|out(_0)?|qkv_mlp_proj|add_out)|add_[qkv]_proj)"


def init(variables: PyTree, rank: int, key: Key[Array, ""], targets: str = ATTENTION) -> PyTree:
    """New updates {"down", "up"} for linear maps and convolutions. They change nothing before training.

    targets: regular expression. It selects the maps whose path, joined by "/", ends in a match.
    Returns float32 updates, nested like the "params" of the variables.
    Raises ValueError for a rank below 1, and if no map matches.
    """
    if rank < 1:
        raise ValueError(f"a LoRA's rank must be at least 1, got {rank}")
    updates: dict = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *module, name = (part.key for part in path)
        joined = "/".join(module)
        if name != "kernel" or not re.search(f"(?:{targets})$", joined):
            continue
        module_updates = updates
        for part in module:
            module_updates = module_updates.setdefault(part, {})
        module_key = jax.random.fold_in(key, zlib.crc32(joined.encode()))
        module_updates["down"] = jax.random.normal(module_key, (*kernel.shape[:-1], rank)) / rank
        stack = kernel.shape[:1] if is_stacked(tuple(module)) else ()
        module_updates["up"] = jnp.zeros((*stack, rank, kernel.shape[-1]))
    if not updates:
        raise ValueError(f"no map of the network matches {targets!r}")
    return updates


def with_updates(variables: PyTree, updates: PyTree, scale: float) -> PyTree:
    """The variables of the network with its updates.

    scale: alpha / rank.
    """

    def scaled(path: tuple, leaf: Array | np.ndarray) -> Array | np.ndarray:
        return scale * leaf if path[-1].key == "up" else leaf

    return {**variables, "lora": jax.tree_util.tree_map_with_path(scaled, updates)}
