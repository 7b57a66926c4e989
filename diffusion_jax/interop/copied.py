"""Parts of a pipeline of which only some layers are loaded: they are saved as copies of what they were loaded from."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from diffusion_jax.interop.family import Component
from diffusion_jax.interop.names import to_torch
from diffusion_jax.interop.tensors import read_file, read_tensors, write_file


def write_changed(component: Component, module: Any, params: PyTree, folder: Path, source: Path) -> None:
    """Write those files of a copied part again of which a tensor has changed since loading, each in its own type.

    module, params: the part as it is now, with the layers that were loaded.
    folder: the copy.
    source: the folder that it was copied and loaded from.
    """
    files = {file.name: read_file(file) for file in sorted(source.glob("*.safetensors"))}
    if not files:
        files = {f"{component.weights}.safetensors": read_tensors(source, component.weights, allow_pickle=True)[0]}
    ours = to_torch(params)
    for file, tensors in files.items():
        places = {id(tensor): place for place, tensor in component.tensors(tensors, module).items()}
        loaded = {name: ours[places[id(tensor)]] for name, tensor in tensors.items() if id(tensor) in places}
        changed = {
            name: tensor.astype(tensors[name].dtype)
            for name, tensor in loaded.items()
            if _differ(tensor, tensors[name])
        }
        if changed:
            write_file(folder / file, {**tensors, **changed})


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether they differ by more than the rounding of one of their types."""
    return not (np.array_equal(a, b.astype(a.dtype)) or np.array_equal(a.astype(b.dtype), b))
