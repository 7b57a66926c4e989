"""The weights that a training starts from."""

from collections.abc import Callable
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from diffusion_jax.build import shipped
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.growing import grown

NEW = ("to_embedding", "cond_proj")  # what a student may have and its teacher not


def initial(folder: str, load: Callable[[Any], tuple[Any, PyTree]], params: PyTree) -> PyTree:
    """The weights in a folder, or the random ones if no folder is named. Those of a U-Net without the outer levels of
    the one that is trained become its inner part (`models.growing`).

    load: folder -> (network, its weights).
    params: the random weights of the network that is trained.
    Raises ValueError if the folder has the weights of another network.
    """
    if not folder:
        return params
    return _checked(folder, grown(load(shipped.find(folder))[1], params), params)


def _checked(folder: str, found: PyTree, params: PyTree) -> PyTree:
    """`found`, or a ValueError if its shapes are not those of params. folder: in the error."""
    shapes = [{keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(tree)} for tree in (found, params)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        got, expected = (of_all.get(path, "none") for of_all in shapes)
        if got != expected:
            raise ValueError(f"{folder} has the weights of another network: {path} is {got}, expected {expected}")
    return found


def from_teacher(teacher: DiffusionModel, params: PyTree) -> PyTree:
    """The weights of a teacher for its student, which may have more embeddings: of the target and of the guidance
    scale. Those begin at zero.

    params: the random weights of the student.
    Raises ValueError for a teacher of another network.
    """
    return _checked("config.teacher", _with_new(teacher.params, params), params)


def _with_new(found: PyTree, params: PyTree) -> PyTree:
    """`found`, and the embeddings in NEW of params that it lacks."""
    if not isinstance(params, dict):
        return found
    added = {name: params[name] for name in NEW if name in params and name not in found}
    return {name: _with_new(part, params.get(name)) for name, part in found.items()} | added
