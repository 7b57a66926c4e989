"""Low-rank updates of published models (LoRA, Hu et al. 2021), added to their weights.

    W <- W + scale · (alpha / rank) · up · down       a linear map: down (rank, in), up (out, rank)
                                                      a convolution: down (rank, in, h, w), up (out, rank, 1, 1)

There are two naming schemes for the updated maps. Kohya's files join the path with underscores, and use the path of the
original code for SDXL. Files of diffusers and peft use dots:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight, ….lora_up.weight, ….alpha
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, ….lora_B.weight
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path as tree_leaves
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax.interop.names import torch_name
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.tensors import read_file, read_metadata, write_file
from diffusion_jax.messages import first_line

DENOISER = "unet"  # its name in files for models trained with this library
# Suffixes of tensor names, and which part of an update they mean.
ROLES = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora.down.weight": "down", "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora.up.weight": "up", "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip


class Update(NamedTuple):
    """down (rank, in, …), up (out, rank, …), and alpha, which is the rank if the file does not give it."""

    down: np.ndarray
    up: np.ndarray
    alpha: float


def load_lora(path: str | Path, pipeline: PublishedPipeline | None = None) -> dict[str, dict[str, Update]]:
    """The updates of a .safetensors file by part, such as "unet" and "text_encoder", and map.

    A map is named by its path joined with underscores, because the names in every file can be converted to that.
    pipeline: its family says how names in the file are read. None for a model trained with this library.
    Raises ValueError for tensors that are not part of a LoRA and for incomplete updates.
    """
    tensors_by_target: dict[tuple[str, str], dict] = {}
    tensors = read_file(path)
    alphas = _alphas(path)
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in ROLES if name.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(
                f"{path}: {name} is not a tensor of a LoRA; expected names that end in one of {', '.join(ROLES)}"
            )
        place = _place(name.removesuffix(suffix), pipeline)
        tensors_by_target.setdefault(place, {})[ROLES[suffix]] = tensor
    parts: dict[str, dict[str, Update]] = {}
    for (part, target), tensors in tensors_by_target.items():
        down, up = (tensors.get(half, np.zeros(())) for half in ("down", "up"))
        if min(down.ndim, up.ndim) < 2 or len(down) != up.shape[1] or len(down) == 0:
            raise ValueError(f"{path}: {part} {target} needs both halves of an update, of one rank")
        alpha = tensors.get("alpha", alphas.get(f"{part}.lora_alpha", len(down)))
        parts.setdefault(part, {})[target] = Update(down, up, np.asarray(alpha, np.float64).item())
    return parts


def save_lora(
    path: str | Path, updates: PyTree, scale: float, dtype: DTypeLike = np.float32, part: str = DENOISER
) -> None:
    """Write updates of a denoiser, as `models.lora` trains them, to a .safetensors file in the layout of peft.

    scale: alpha / rank. `up` is multiplied by it, so that readers see an alpha equal to the rank.
    part: of a published pipeline, its name for the denoiser.
    """
    tensors = {}
    leaves = {tuple(key.key for key in keys): np.asarray(leaf, np.float32) for keys, leaf in tree_leaves(updates)}
    for (*module, half), leaf in leaves.items():
        name = f"{part}." + torch_name((*module, "kernel")).removesuffix(".weight")
        letter, factor = {"down": ("A", 1.0), "up": ("B", scale)}[half]
        tensor = leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
        if half == "up" and leaves[(*module, "down")].ndim > 2:
            tensor = tensor[..., None, None]  # a 1x1 convolution
        tensors[f"{name}.lora_{letter}.weight"] = factor * tensor
    write_file(path, tensors, dtype)


def merge_lora(pipeline: PublishedPipeline, path: str | Path, scale: float = 1.0) -> PublishedPipeline:
    """The pipeline with the updates of a file added to its weights. Scale -1 removes updates of scale 1.

    Raises ValueError for updates of unknown maps or of another shape, and the errors of `load_lora`.
    """
    updates = load_lora(path, pipeline)
    unknown = updates.keys() - pipeline.parts.keys()
    if unknown:
        raise ValueError(f"{path} updates {', '.join(sorted(unknown))}, which this pipeline does not have")
    parts = {
        name: part._replace(params=merge(part.params, updates.get(name, {}), scale, f"{path}, {name}"))
        for name, part in pipeline.parts.items()
    }
    return pipeline._replace(parts=parts)


def merge(params: PyTree, updates: Mapping[str, Update], scale: float, source: str) -> PyTree:
    """Add updates, named as by `load_lora`, to the kernels of Flax variables.

    source: the file, for messages.
    """
    remaining = dict(updates)

    def merged(keys, leaf):
        path = tuple(key.key for key in keys[1:])
        target = torch_name(path).removesuffix(".weight").replace(".", "_")
        if path[-1] != "kernel" or target not in remaining:
            return leaf
        change = _product(remaining.pop(target))
        if math.prod(change.shape[2:]) == 1:  # a linear map may be stored as a 1x1 convolution, and vice versa
            change = change.reshape(*change.shape[:2], *(1,) * (leaf.ndim - 2))
        if change.ndim == leaf.ndim:
            change = change.T if change.ndim == 2 else change.transpose(2, 3, 1, 0)
        if change.shape != leaf.shape:
            raise ValueError(f"{source}: the update of {target} makes {change.shape}, the map has {leaf.shape}")
        return (leaf.astype(jnp.float32) + scale * change).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(merged, params)
    if remaining:
        raise ValueError(
            f"{source}: {len(remaining)} updates of maps that the network does not have, such as {min(remaining)}"
        )
    return params


def _alphas(path):
    """The alphas that diffusers writes into the header of a file: {"unet.lora_alpha": 8, …}."""
    try:
        return dict(json.loads(read_metadata(path).get("lora_adapter_metadata", "{}")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: malformed lora_adapter_metadata in its header: {first_line(error)}") from None


def _place(name, pipeline):
    """(part, path joined with underscores) of the map `name` in a file."""
    parts, prefixes, denoiser = {DENOISER: None}, {}, DENOISER
    if pipeline is not None:
        family = pipeline.family
        parts, prefixes, denoiser = family.parts, family.lora.prefixes, family.denoiser
    joined = next((prefix for prefix in prefixes if name.startswith(f"{prefix}_")), None)
    if joined:
        part = prefixes[joined]
        path = family.lora.path(part, name.removeprefix(f"{joined}_"), pipeline.denoiser.module)
    else:
        head, _, tail = name.partition(".")
        part, path = (head, tail) if head in {*prefixes.values(), *parts} else (denoiser, name)
        path = re.sub(r"base_model\.model\.|\.processor", "", path)
        path = re.sub(r"\.to_out$", ".to_out.0", path)  # older files omit the index
        path = re.sub(r"self_attn\.to_(q|k|v|out)(\.0)?$", r"self_attn.\1_proj", path)
    path = parts[part].qualified(path) if parts.get(part) else path
    return part, path.replace(".", "_")


def _product(update):
    """alpha / rank · up · down, (out, in) or (out, in, height, width)."""
    down, up = (np.asarray(half, np.float32) for half in (update.down, update.up))
    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return update.alpha / len(down) * product.reshape(len(up), *down.shape[1:])
