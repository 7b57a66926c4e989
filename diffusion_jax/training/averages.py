"""Averages of the weights, whose length is chosen after training (post-hoc EMA, Karras et al. 2024, section 3).

Training keeps two averages whose weight grows as a power of the step, and saves them along the run. An average of
another length is the combination of the saved ones whose weights over the steps are nearest to its own. A length is
refused if the saved averages cannot come near enough.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jaxtyping import Array, Float, Int, PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diffusion_jax import paths
from diffusion_jax.paths import Path

LENGTHS = (0.05, 0.10)  # of the averages kept, as `exponent` takes them
LONGEST = 0.28  # near 1 / sqrt(12), the deviation of a flat average
MISFIT = 0.15  # the largest of a combination, see `combinations`
OTHERS = tuple(round(0.005 * i, 3) for i in range(1, 57))  # lengths to try instead of one that cannot be given


def exponent(length: float) -> float:
    """The exponent gamma of weights tau^gamma over steps 0..t, whose standard deviation is length t (eq. 2 and 3).

    Raises ValueError for a length outside (0, 0.28].
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be in (0, {LONGEST}], a part of the run; got {length:g}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def updated(averages: dict[str, PyTree], params: PyTree, step: Int[Array, ""]) -> dict[str, PyTree]:
    """The averages after one more step (eq. 5).

    params: the weights after this step.
    step: number of steps before this one.
    """

    def update(name: str, average: PyTree) -> PyTree:
        # 1 - (1 - 1 / (step + 1)) ** (exponent + 1), exact for many steps too
        rate = -jnp.expm1((exponent(float(name)) + 1) * jnp.log1p(-1 / (step + 1.0)))
        return jax.tree.map(lambda old, new: old + rate * (new - old), average, params)

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
        for path, leaf in flat_leaves(tree)
    }
    with paths.written(folder / f"{step}.safetensors") as file:
        save_file(flat, file)


def steps(folder: Path) -> list[int]:
    """The steps whose averages are in the folder."""
    return sorted(int(file.stem) for file in folder.glob("*.safetensors"))


def forget_after(folder: Path, step: int) -> None:
    """Remove averages of later steps, left by a run whose newer checkpoints are gone."""
    for later in steps(folder):
        if later > step:
            (folder / f"{later}.safetensors").unlink()


class _Saved(NamedTuple):
    step: int
    name: str


def load(folder: Path, step: int, length: float, like: PyTree) -> PyTree:
    """The average of a length at a step, float32 on the host.

    step: of the run, at which averages were saved.
    length: standard deviation of its weights over the steps, as a part of the run so far (sigma_rel).
    like: a pytree of the same structure and shapes.
    Raises what `factors` raises, and ValueError for files that do not fit.
    """
    total = {path: np.zeros(leaf.shape) for path, leaf in flat_leaves(like)}
    for saved_step, averages in itertools.groupby(factors(folder, step, length).items(), lambda item: item[0].step):
        tensors = _read(folder / f"{saved_step}.safetensors", total)
        for average, factor in averages:
            for path in total:
                total[path] += factor * tensors[f"{average.name}/{path}"]
    leaves = [values.astype(np.float32) for values in total.values()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def factors(folder: Path, step: int, length: float) -> dict[_Saved, np.float64]:
    """The factor of each saved average in the average of a length at a step, in the order of their steps.

    The factors sum to 1. They are float64, so their products with averages in half precision are too.

    step, length: as in `load`.
    Raises ValueError for a length out of range, and for one that the saved averages cannot give; FileNotFoundError
    without averages of this step.
    """
    saved_steps = [saved_step for saved_step in steps(folder) if saved_step <= step]
    if not saved_steps or saved_steps[-1] != step:
        available = ", ".join(map(str, steps(folder))) or "none"
        raise FileNotFoundError(
            f"no averages of step {step} in {folder}, there are {available}: train with --config.train.post_hoc"
        )
    saved = [_Saved(saved_step, f"{each_length:.2f}") for saved_step in saved_steps for each_length in LENGTHS]
    averages = [(average.step, exponent(float(average.name))) for average in saved]
    found, (misfit,) = combinations(averages, [(step, exponent(length))])
    if misfit > MISFIT:
        _, misfits = combinations(averages, [(step, exponent(other)) for other in OTHERS])
        nearest = min(
            (other for other, fit in zip(OTHERS, misfits, strict=True) if fit <= MISFIT),
            key=lambda other: abs(other - length),
        )
        raise ValueError(
            f"the averages in {folder}, saved at {len(saved_steps)} steps up to {step}, cannot give one of length "
            f"{length:g}: the nearest is {nearest:g}; a smaller train.checkpoint_every saves more of them"
        )
    return dict(zip(saved, found[:, 0], strict=True))


def combinations(
    averages: Sequence[tuple[int, float]], targets: Sequence[tuple[int, float]]
) -> tuple[Float[np.ndarray, "averages targets"], Float[np.ndarray, " targets"]]:
    """(factors, misfits) of the weighted sums of averages that are nearest to the targets in the weights over steps.

    The sums are those of Karras et al. 2024, appendix C.3, with one more condition: the factors of a target sum to 1.
    So the average of weights that do not change is these weights.

    averages, targets: (step, exponent) of averages.
    misfits: the deviation from the target's weights over the steps, as a part of these, both as root mean squares.
    """
    overlaps, onto = _overlaps(averages, averages), _overlaps(averages, targets)
    # the last average stands for what the factors of the others leave of 1, so the unknowns count differences from it
    differences = overlaps[:-1, :-1] - overlaps[:-1, -1:] - overlaps[-1:, :-1] + overlaps[-1, -1]
    others = np.linalg.lstsq(differences, onto[:-1] - onto[-1:] - overlaps[:-1, -1:] + overlaps[-1, -1], rcond=1e-12)[0]
    found = np.concatenate([others, 1 - others.sum(0, keepdims=True)])
    squares = np.array([_overlaps([target], [target])[0, 0] for target in targets])
    errors = squares - 2 * np.sum(found * onto, axis=0) + np.sum(found * (overlaps @ found), axis=0)
    return found, np.sqrt(np.maximum(errors, 0) / squares)


def _overlaps(
    rows: Sequence[tuple[int, float]], columns: Sequence[tuple[int, float]]
) -> Float[np.ndarray, "rows columns"]:
    """Integrals of products of two averages' weights, (gamma + 1) tau^gamma / t^(gamma + 1) for tau in [0, t]."""
    t_a, gamma_a = np.array(rows, np.float64).T[..., None]
    t_b, gamma_b = np.array(columns, np.float64).T
    both, shorter = gamma_a + gamma_b + 1, np.minimum(t_a, t_b)
    # (shorter / t)^(gamma + 1) of each, so that no power overflows
    powers = (shorter / t_a) ** (gamma_a + 1) * (shorter / t_b) ** (gamma_b + 1)
    return (gamma_a + 1) * (gamma_b + 1) / both / shorter * powers


def flat_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf) of each leaf, the path joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _read(file: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(paths.fetched(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it") from error
    for path, leaf in like.items():
        for length in LENGTHS:
            name = f"{length:.2f}/{path}"
            if name not in tensors or tensors[name].shape != leaf.shape:
                raise ValueError(f"{file} is of another model: it lacks {name} of shape {leaf.shape}")
    return tensors
