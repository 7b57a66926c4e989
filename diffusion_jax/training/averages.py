"""Averages of the weights, whose length is chosen after training (post-hoc EMA, Karras et al. 2024, section 3).

Training keeps two averages whose weight grows as a power of the step, and saves them along the run. An average of
another length is the combination of the saved ones whose weights over the steps are nearest to its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jaxtyping import Array, Float, Int, PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

LENGTHS = (0.05, 0.10)  # of the averages kept, as `exponent` takes them
LONGEST = 0.28  # near 1 / sqrt(12), the deviation of a flat average


def exponent(length: float) -> float:
    """The exponent gamma of weights tau^gamma over steps 0..t, whose standard deviation is length t (eq. 2 and 3).

    Raises ValueError for a length outside (0, 0.28].
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be in (0, {LONGEST}], a part of the run; got {length:g}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def updated(averages: dict[str, PyTree], params: PyTree, step: Int[Array, ""]) -> dict[str, PyTree]:
    """The averages after one more step (eq. 5). step: number of steps before this one."""

    def update(name: str, average: PyTree) -> PyTree:
        decay = (1 - 1 / (step + 1.0)) ** (exponent(float(name)) + 1)
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)

    return {name: update(name, average) for name, average in averages.items()}


def initial(params: PyTree) -> dict[str, PyTree]:
    """The averages before the first step."""
    return {f"{length:.2f}": jax.tree.map(jnp.copy, params) for length in LENGTHS}


def save(folder: Path, step: int, averages: dict[str, PyTree]) -> None:
    """Write folder/STEP.safetensors in half precision."""
    folder.mkdir(exist_ok=True)
    flat = {
        f"{name}/{path}": np.asarray(leaf, np.float16)
        for name, tree in averages.items()
        for path, leaf in _flat_leaves(tree)
    }
    partial = folder / f"{step}.partial"
    save_file(flat, partial)
    partial.rename(folder / f"{step}.safetensors")


def steps(folder: Path) -> list[int]:
    """The steps whose averages are in the folder."""
    return sorted(int(file.stem) for file in folder.glob("*.safetensors"))


class _Saved(NamedTuple):
    step: int
    name: str


def load(folder: Path, step: int, length: float, like: PyTree) -> PyTree:
    """The average of a length at a step, float32.

    step: of the run, at which averages were saved.
    length: standard deviation of its weights over the steps, as a part of the run so far (sigma_rel).
    like: a pytree of the same structure and shapes.
    Raises ValueError for a length out of range and for files that do not fit, FileNotFoundError without averages.
    """
    saved_steps = [saved_step for saved_step in steps(folder) if saved_step <= step]
    if not saved_steps or saved_steps[-1] != step:
        available = ", ".join(map(str, steps(folder))) or "none"
        raise FileNotFoundError(
            f"no averages of step {step} in {folder}, there are {available}: train with --config.train.post_hoc"
        )
    saved_averages = [_Saved(saved_step, f"{each_length:.2f}") for saved_step in saved_steps for each_length in LENGTHS]
    factors = combination(
        [(average.step, exponent(float(average.name))) for average in saved_averages], (step, exponent(length))
    )
    total = {path: np.zeros(leaf.shape) for path, leaf in _flat_leaves(like)}
    for saved_step in saved_steps:
        tensors = _read(folder / f"{saved_step}.safetensors", total)
        for average, factor in zip(saved_averages, factors, strict=True):
            if average.step == saved_step:
                for path in total:
                    total[path] += factor * tensors[f"{average.name}/{path}"]
    leaves = [jnp.asarray(values, jnp.float32) for values in total.values()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def combination(averages: Sequence[tuple[int, float]], target: tuple[int, float]) -> Float[np.ndarray, " averages"]:
    """Factors of the averages. Their weighted sum is nearest to the target in the weights over steps (appendix C.3).

    averages, target: (step, exponent) of averages.
    """
    overlaps = np.array([[_overlap(a, b) for b in averages] for a in averages])
    return np.linalg.lstsq(overlaps, np.array([_overlap(a, target) for a in averages]), rcond=1e-12)[0]


def _overlap(a: tuple[int, float], b: tuple[int, float]) -> float:
    """The integral of the product of two averages' weights, (gamma + 1) tau^gamma / t^(gamma + 1) for tau in [0, t]."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    both, shorter = gamma_a + gamma_b + 1, min(t_a, t_b)
    # (shorter / t)^(gamma + 1) of each, so that no power overflows
    return (
        (gamma_a + 1)
        * (gamma_b + 1)
        / both
        / shorter
        * (shorter / t_a) ** (gamma_a + 1)
        * (shorter / t_b) ** (gamma_b + 1)
    )


def _flat_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _read(file: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it") from error
    for path, leaf in like.items():
        for length in LENGTHS:
            name = f"{length:.2f}/{path}"
            if name not in tensors or tensors[name].shape != leaf.shape:
                raise ValueError(f"{file} is of another model: it lacks {name} of shape {leaf.shape}")
    return tensors
