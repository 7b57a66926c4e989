"""The weights that a training starts from."""

from collections.abc import Callable
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from diffusion_jax.app import shipped


def initial(folder: str, load: Callable[[Any], tuple[Any, PyTree]], params: PyTree) -> PyTree:
    """The weights in a folder, or the random ones if no folder is named.

    load: folder -> (network, its weights).
    params: the random weights of the network that is trained.
    Raises ValueError if the folder has the weights of another network.
    """
    if not folder:
        return params
    _, found = load(shipped.find(folder))
    shapes = [{keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(tree)} for tree in (found, params)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        got, expected = (of_all.get(path, "none") for of_all in shapes)
        if got != expected:
            raise ValueError(f"{folder} has the weights of another network: {path} is {got}, expected {expected}")
    return found
