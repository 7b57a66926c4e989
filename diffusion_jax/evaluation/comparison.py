"""Compare generated pictures with real ones: the distances of both to a reference set, in the features of one network.

A distance alone can be gamed, and depends on the number of pictures. So each comes with the distance of as many real
pictures that are not in the reference, and with the ratio of the two: 1 is as good as real.
"""

import zipfile
from collections.abc import Callable, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from diffusion_jax import paths
from diffusion_jax.evaluation.distances import (
    Estimate,
    Gaussian,
    Guesses,
    Moments,
    check_finite,
    frechet,
    gaussian,
    guesses,
    inception_score,
    jackknife,
    kernel,
    moments,
    neighbours,
    total,
)
from diffusion_jax.evaluation.summary import summary

GROUPS = 10  # of pictures, for standard errors
MIN_PICTURES = 2 * GROUPS  # in each set
STATISTICS = ("mu", "sigma", "network", "count", "features", "indices")  # arrays of a file
MAX_FEATURES = 10_000  # of pictures, kept in memory
CHOICES = 100  # prompts of which one fits a picture
NUM_NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}  # neighbours that give a ball its radius


class Collected:
    """The statistics of a set of pictures that a comparison needs, collected batch by batch, of bounded size.

    moments: of each of ten groups of pictures.
    guesses: the same, of a classifier; empty without.
    features: (K, D) float32, of the first 10,000 pictures.
    """

    def __init__(self):
        self.count = 0
        self.moments: list[Moments] = []
        self.guesses: list[Guesses] = []
        self._features: list[np.ndarray] = []

    @property
    def features(self) -> Float[np.ndarray, "pictures features"]:
        return np.concatenate(self._features)

    def add(self, outputs: dict[str, Float[np.ndarray, "pictures _"]]) -> None:
        """Add a batch of pictures.

        outputs: what `FeatureNetwork.extract` returns.
        Raises ValueError for features that are not finite.
        """
        check_finite(outputs["features"])
        groups = (self.count + np.arange(len(outputs["features"]))) % GROUPS
        _add(self.moments, moments, outputs["features"], groups)
        if "logits" in outputs:
            _add(self.guesses, guesses, outputs["logits"], groups)
        if self.count < MAX_FEATURES:
            self._features.append(np.array(outputs["features"][: MAX_FEATURES - self.count], np.float32))
        self.count += len(groups)


def _add(
    sums: list, statistic: Callable[[np.ndarray], Moments | Guesses], rows: np.ndarray, groups: np.ndarray
) -> None:
    """Add the statistic of each group's rows to the group's sum. New groups come in the order of their numbers."""
    for group in np.unique(groups):
        part = statistic(rows[groups == group])
        if group < len(sums):
            sums[group] += part
        else:
            sums.append(part)


class Reference(NamedTuple):
    """The real pictures that others are compared with.

    network: name of the feature network.
    count: number of pictures, 0 if unknown.
    gaussian: fitted to the features.
    features: (K, D), those of the first pictures; empty if only the Gaussian is known.
    indices: (K,), the numbers of these pictures in their source; empty if unknown.
    """

    network: str
    count: int
    gaussian: Gaussian
    features: Float[np.ndarray, "pictures features"]
    indices: Int[np.ndarray, " numbers"]


def save_reference(file: str | PathLike, network: str, real: Collected, indices: Sequence[int]) -> None:
    """Write the statistics of real pictures as .npz, whose `mu` and `sigma` ADM's evaluator and clean-fid read too.

    indices: numbers of the pictures in their source.
    """
    all_moments = total(real.moments)
    parts = {"mu": all_moments.mean, "sigma": all_moments.covariance, "features": real.features}
    details = {"network": network, "count": real.count, "indices": indices[: len(real.features)]}
    with paths.written(file) as unfinished, unfinished.open("wb") as out:
        np.savez(out, **parts, **{name: np.array(value) for name, value in details.items()})


def load_reference(file: str | PathLike, network: str, width: int | None = None) -> Reference:
    """Statistics as `save_reference`, ADM's evaluator or clean-fid write them.

    network: name of the feature network. A file that names no network must have the right width.
    width: number of its features; None if the file is known to fit.
    Raises ValueError for a file of another layout or another network, and FileNotFoundError.
    """
    try:
        with np.load(paths.fetched(file), allow_pickle=False) as archive:
            parts = {name: archive[name] for name in STATISTICS if name in archive}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file} is no .npz file of statistics: {error}") from error
    if "mu" not in parts or "sigma" not in parts:
        raise ValueError(f"{file} has no mu and sigma, as the statistics of ADM's evaluator and clean-fid have")
    file_network = str(parts.get("network", network))
    if file_network != network:
        raise ValueError(f"{file} has statistics in the features of {file_network}, and these are of {network}")
    mean, covariance = (np.asarray(parts[name], np.float64) for name in ("mu", "sigma"))
    width = width or len(mean)
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{file} has mu of shape {mean.shape} and sigma of {covariance.shape}, but {network} has {width} features"
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise ValueError(f"{file} has statistics that are not finite")
    features = parts.get("features", np.zeros((0, width), np.float32))
    indices = parts.get("indices", np.zeros(0, int))
    return Reference(network, int(parts.get("count", 0)), gaussian(mean, covariance), features, indices)


def warn_of_rank(network: str, pictures: Collected) -> None:
    """Warn that Frechet distances are too large if there are fewer pictures than features."""
    width = len(pictures.moments[0].mean)
    if pictures.count <= width:
        logging.warning(
            "%d pictures in the %d features of %s: their covariance has no full rank, so Frechet distances are much "
            "too large; compare only the ratio, and sets of %d, or set eval.images to more than %d",
            *(pictures.count, width, network, pictures.count, width),
        )


def compare(sets: dict[str, Collected], real: Reference) -> dict:
    """The report on sets of pictures: for each measure the figure of each set, with its standard error.

    frechet, kernel: distances to the reference. "ratio" is that of "generated" over that of "held_out".
    precision, recall, density, coverage: as `distances.Neighbours`, of as many pictures of the reference as of a set.
    inception_score: of classifiers.

    sets: "generated" and "held_out", real pictures that are not in the reference, and others. As large as each other.
    Raises ValueError for fewer than 20 pictures.
    """
    for name, pictures in sets.items():
        if pictures.count < MIN_PICTURES:
            raise ValueError(
                f"distances need at least {MIN_PICTURES} pictures in each set, got {pictures.count} of {name}"
            )
    report = {"frechet": {name: _frechet(pictures, real) for name, pictures in sets.items()}}
    if len(real.features):
        report["kernel"] = {name: kernel(pictures.features, real.features) for name, pictures in sets.items()}
    for measure, estimates in report.items():
        report[measure] = _reported(estimates | _ratio(**estimates))
    if len(real.features):
        report |= _overlaps(sets, real)
    if sets["generated"].guesses:
        report["inception_score"] = _reported({name: _inception_score(pictures) for name, pictures in sets.items()})
    return report


def _reported(estimates: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def _frechet(pictures: Collected, real: Reference) -> Estimate:
    return jackknife(lambda groups: frechet(total(groups), real.gaussian), pictures.moments)


def _inception_score(pictures: Collected) -> Estimate:
    return jackknife(lambda groups: inception_score(total(groups)), pictures.guesses)


def _ratio(generated: Estimate, held_out: Estimate, **others: Estimate) -> dict[str, Estimate]:
    """Generated over held-out, if the latter is not 0 to within its error."""
    if held_out.value <= 2 * held_out.standard_error:
        return {}
    ratio = generated.value / held_out.value
    parts = (generated.standard_error, ratio * held_out.standard_error)
    return {"ratio": Estimate(ratio, float(np.hypot(*parts)) / held_out.value)}


def _overlaps(sets: dict[str, Collected], real: Reference) -> dict:
    """Precision, recall, density and coverage of sets of one size."""
    size = min(len(pictures.features) for pictures in (*sets.values(), real))
    report: dict = {measure: {} for measure in NUM_NEIGHBOURS}
    for name, pictures in sets.items():
        by_k = {k: neighbours(real.features[:size], pictures.features[:size], k) for k in set(NUM_NEIGHBOURS.values())}
        for measure, k in NUM_NEIGHBOURS.items():
            report[measure][name] = summary(getattr(by_k[k], measure))
    return report


def alignment(
    pictures: Float[np.ndarray, "n features"], texts: Float[np.ndarray, "n features"]
) -> dict[str, dict[str, float | None]]:
    """How well pictures fit their prompts, in the features of CLIP.

    clip_score: 100 max(cos, 0) of a picture and its prompt (Hessel et al. 2021, eq. 1, w = 100).
    retrieval: whether its own prompt is the nearest of 100 to the picture (R-precision, Xu et al. 2018). The others are
      the 99 that follow it, or all if there are fewer.
    """
    pictures, texts = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (pictures, texts))
    choices = min(CHOICES, len(texts))
    similarities = np.stack([(pictures * np.roll(texts, -k, axis=0)).sum(axis=1) for k in range(choices)], axis=1)
    retrieved = similarities[:, 0] >= similarities.max(axis=1) - 1e-6
    return {"clip_score": summary(100 * np.maximum(similarities[:, 0], 0)), "retrieval": summary(retrieved)}
