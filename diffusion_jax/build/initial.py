"""The weights that a training starts from."""

from collections.abc import Callable
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from diffusion_jax.build import shipped
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.growing import grown

# modules that a student may have and its teacher may lack
NEW_EMBEDDINGS = ("to_embedding", "cond_proj", "interval_embedding")


def initial(folder: str, load: Callable[[Any], tuple[Any, PyTree]], params: PyTree) -> PyTree:
    """The weights in a folder, or the random ones if no folder is named.

    A U-Net in the folder may lack the outer levels of the one that is trained. It then becomes the inner part of that
    (`models.growing`).

    folder: "" for none.
    load: folder -> (network, its weights).
    params: the random weights of the network that is trained.
    Raises ValueError if the folder has the weights of another network.
    """
    if not folder:
        return params
    return _check_shapes(folder, grown(load(shipped.find(folder))[1], params), params)


def _check_shapes(folder: str, weights: PyTree, params: PyTree) -> PyTree:
    """Return `weights`. Raises ValueError if their shapes differ from those of params. folder: named in the error."""
    shapes = [{keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(tree)} for tree in (weights, params)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        got, expected = (leaf_shapes.get(path, "none") for leaf_shapes in shapes)
        if got != expected:
            raise ValueError(f"{folder} has the weights of another network: {path} is {got}, expected {expected}")
    return weights


def from_teacher(teacher: DiffusionModel, params: PyTree) -> PyTree:
    """The weights of a teacher for its student.

    A student may have more embeddings, of the target and of the guidance scale and interval. These start at zero.

    params: the random weights of the student.
    Raises ValueError for a teacher of another network.
    """
    return _check_shapes("config.teacher", _with_new_embeddings(teacher.params, params), params)


def _with_new_embeddings(weights: PyTree, params: PyTree) -> PyTree:
    """`weights`, and those NEW_EMBEDDINGS of params that they lack."""
    if not isinstance(params, dict):
        return weights
    added = {name: params[name] for name in NEW_EMBEDDINGS if name in params and name not in weights}
    return {name: _with_new_embeddings(part, params.get(name)) for name, part in weights.items()} | added
