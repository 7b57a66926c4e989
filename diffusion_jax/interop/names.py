"""The rule from Flax parameters to the tensors of a torch state dict, the same for all models.

    down_blocks_0 / resnets_1 / conv1 / kernel, (H, W, in, out)
    down_blocks.0.resnets.1.conv1.weight, (out, in, H, W)

The path is joined with dots. An index after an underscore becomes an index after a dot. Kernels are transposed. Kernel,
scale and embedding are all called weight. Layers whose variables are stacked (`models.stacking`) have tensors of their
own.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax import parallel
from diffusion_jax.interop.quantized import Scaled, Tensor
from diffusion_jax.interop.tensors import check_finite, release
from diffusion_jax.models.stacking import layers, mapped
from diffusion_jax.stored import Stored, loaded

# Names in which the number is part of diffusers' name and not an index.
NUMBERED = re.compile(r"(linear|wi|proj_out)_\d+")
# Names of attention in the oldest autoencoder and U-Net checkpoints. diffusers renames them in the same way.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_name(path: tuple[str, ...]) -> str:
    """The state dict name of the parameter at `path`, e.g. ("to_out_0", "kernel") -> "to_out.0.weight"."""
    *modules, leaf = path
    modules = [name if NUMBERED.fullmatch(name) else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """Flax variables {"params": ...} -> a torch state dict of numpy arrays of the same type, as views if possible."""
    arrays = jax.tree.map(np.asarray, params)
    return {torch_name(path): kernel_to_torch(path, leaf) for path, leaf in _leaves(arrays)}


def from_torch(
    tensors: Mapping[str, Tensor],
    source: str,
    like: PyTree,
    dtype: DTypeLike | None = None,
    stored: bool = False,
) -> PyTree:
    """Convert a torch state dict to Flax variables with the structure and shapes of `like`, a few tensors at a time.

    source: the file, for messages.
    like: arrays or shapes, e.g. `jax.eval_shape(module.init, key, *inputs)`.
    dtype: of the variables. None uses those of `like`.
    stored: leave the variables in the file until they are used (`diffusion_jax.stored`).
    Raises ValueError naming the first few tensors that are missing, unknown or of another shape, or, where they are
    read, one with values that are not finite.
    """
    tensors = modern(tensors)
    verbs = ("lacks", "has unknown", "has misshapen")
    for verb, names in zip(verbs, differences(tensors, like), strict=True):
        if names:
            first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(
                f"{source} {verb} {len(names)} tensor{'s' * (len(names) > 1)}: {first}; "
                "do its config.json and its weights belong together?"
            )

    def read(path, leaf):
        name = torch_name(path)
        tensor = np.asarray(tensors[name])
        check_finite(name, tensor, source)
        return kernel_from_torch(path, tensor).astype(dtype or leaf.dtype, copy=False)

    def free(path, leaf):
        for layer, _ in layers(path, leaf):
            tensor = tensors[torch_name(layer)]
            release(tensor.weight if isinstance(tensor, Scaled) else tensor)

    def in_file(path, leaf):
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        of_path = (functools.partial(f, path, shape) for f in (functools.partial(mapped, read), free))
        return Stored(leaf.shape, np.dtype(dtype or leaf.dtype), *of_path)

    tree = jax.tree.unflatten(jax.tree.structure(like), [in_file(*variable) for variable in _variables(like)])
    return tree if stored else loaded(tree, parallel.copier())


def torch_names(params: PyTree) -> set[str]:
    """The names in a torch state dict of all Flax variables, arrays or shapes."""
    return {torch_name(path) for path, _ in _leaves(params)}


class Differences(NamedTuple):
    """Tensors that do not fit a network, by name, and both shapes of the misshapen ones."""

    missing: list[str]
    unknown: list[str]
    misshapen: list[str]


def differences(tensors: Mapping[str, Tensor], like: PyTree) -> Differences:
    """Compare a torch state dict with the structure and shapes of Flax variables."""
    shapes = {torch_name(path): _shape_in_torch(path, leaf.shape) for path, leaf in _leaves(like)}
    return Differences(
        missing=sorted(shapes.keys() - tensors.keys()),
        unknown=sorted(tensors.keys() - shapes.keys()),
        misshapen=[
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    )


def modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with current names: the oldest checkpoints use other names for attention."""
    return {_modern(name): tensor for name, tensor in tensors.items()}


def kernel_to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The tensor of the parameter at `path`: kernels are transposed, (in, out) -> (out, in), (h, w, in, out) ->
    (out, in, h, w).
    """
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def kernel_from_torch(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """The inverse of `kernel_to_torch`."""
    if path[-1] != "kernel":
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def _variables(params):
    """(path below "params", leaf) in the order of jax.tree.leaves."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield tuple(key.key for key in keys[1:]), leaf


def _leaves(params):
    """(path below "params", leaf) of every layer."""
    for path, leaf in _variables(params):
        yield from layers(path, leaf)


def _shape_in_torch(path, shape):
    return kernel_to_torch(path, np.broadcast_to(np.zeros((), bool), shape)).shape


def _modern(name):
    head, _, leaf = name.rpartition(".")
    parent, _, last = head.rpartition(".")
    return f"{parent}.{OLD_NAMES[last]}.{leaf}" if last in OLD_NAMES and ".attentions." in name else name
