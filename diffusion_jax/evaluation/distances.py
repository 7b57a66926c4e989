"""Distances between two sets of pictures, from their features. In float64, equal to the trusted implementations.

Features are (N, D), of any network. A distance means nothing without the network's name. All distances have a bias that
depends on the number of pictures, so compare only sets of one size.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import entr, log_softmax

BLOCK = 2048  # rows of distances at a time


class Estimate(NamedTuple):
    """A figure of a set of pictures and its standard error."""

    value: float
    standard_error: float


class Moments(NamedTuple):
    """Mean and covariance of features, as sums that can be added over batches, devices and hosts.

    count: number of pictures.
    mean: (D,).
    scatter: (D, D), sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " features"]
    scatter: Float[np.ndarray, "features features"]

    @property
    def covariance(self) -> Float[np.ndarray, "features features"]:
        """The unbiased covariance. Raises ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two pictures, got {self.count}")
        return self.scatter / (self.count - 1)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        mean_difference = other.mean - self.mean
        mean = self.mean + mean_difference * (other.count / count)
        between = np.outer(mean_difference, mean_difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def moments(features: Float[np.ndarray, "pictures features"]) -> Moments:
    """The moments of a batch. Raises ValueError for features that are not finite, and for no pictures."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected features (pictures, features) of at least one picture, got {features.shape}")
    check_finite(features)
    mean = features.mean(axis=0)
    return Moments(len(features), mean, (features - mean).T @ (features - mean))


def check_finite(features: Float[np.ndarray, "pictures features"]) -> None:
    """Raise ValueError for features that are not finite."""
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise ValueError(f"{bad.sum()} of {len(features)} pictures have features that are not finite, such as NaN")


class Gaussian(NamedTuple):
    """A Gaussian with covariance F F^T.

    mean: (D,).
    trace: of the covariance.
    factor: F, (D, rank).
    """

    mean: Float[np.ndarray, " features"]
    trace: float
    factor: Float[np.ndarray, "features rank"]


def gaussian(mean: Float[np.ndarray, " features"], covariance: Float[np.ndarray, "features features"]) -> Gaussian:
    """The Gaussian of a mean and a covariance, with a factor that leaves out directions of rounding errors."""
    variances, directions = np.linalg.eigh(covariance)
    significant = variances > variances[-1] * len(variances) * np.finfo(np.float64).eps
    return Gaussian(mean, float(np.trace(covariance)), directions[:, significant] * np.sqrt(variances[significant]))


def frechet(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """The Frechet distance of two Gaussians (Dowson & Landau 1982). In Inception-v3: FID (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The last trace is the sum of the singular values of F_a^T F_b with C = F F^T. This is exact, also for covariances of
    fewer pictures than features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of two networks: {len(a.mean)} and {len(b.mean)} of them")
    a, b = (gaussian(each.mean, each.covariance) if isinstance(each, Moments) else each for each in (a, b))
    root = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    mean_difference = a.mean - b.mean
    return float(mean_difference @ mean_difference + a.trace + b.trace - 2 * root)


def kernel(x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"]) -> Estimate:
    """The kernel distance, KID in the features of Inception-v3 (Binkowski et al. 2018, section 4).

    It is the unbiased squared maximum mean discrepancy of the kernel (x . y / D + 1)^3, so it may be negative. Its
    standard error is that of drawing x, to first order.

    x, y: (N, D) and (M, D), features.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def mean_to_others(features: np.ndarray) -> Float[np.ndarray, " n"]:
        similarities = _polynomial(features, features)
        return (similarities.sum(axis=1) - np.diag(similarities)) / (len(features) - 1)

    within, across = mean_to_others(x), _polynomial(x, y).mean(axis=1)
    value = within.mean() + mean_to_others(y).mean() - 2 * across.mean()
    return Estimate(float(value), float(2 * np.std(within - across, ddof=1) / len(x) ** 0.5))


def _polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


class Guesses(NamedTuple):
    """The class probabilities of a set of pictures, as sums that can be added.

    count: number of pictures.
    p: (classes,), sum of the pictures' probabilities.
    p_log_p: sum over pictures and classes.
    """

    count: int
    p: Float[np.ndarray, " classes"]
    p_log_p: float

    def __add__(self, other: "Guesses") -> "Guesses":
        return Guesses(*map(operator.add, tuple(self), tuple(other)))


def guesses(logits: Float[np.ndarray, "pictures classes"]) -> Guesses:
    """The guesses for a batch of pictures."""
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    return Guesses(len(p), p.sum(axis=0), float((p * log_p).sum()))


def inception_score(sums: Guesses) -> float:
    """The Inception Score (Salimans et al. 2016): exp of the mean divergence of a picture's classes from all."""
    p = sums.p / sums.count
    return float(np.exp(sums.p_log_p / sums.count + entr(p).sum()))


class Neighbours(NamedTuple):
    """How two sets overlap. A measure is the mean of one of these fields.

    Each picture has a ball that reaches to its k-th neighbour in its own set.

    precision: whether a generated picture is in a ball of a real one (Kynkaanniemi et al. 2019).
    recall: whether a real picture is in a ball of a generated one.
    density: number of balls of real pictures around a generated one, over k (Naeem et al. 2020).
    coverage: whether a real picture has a generated one in its ball.
    """

    precision: Bool[np.ndarray, " m"]
    recall: Bool[np.ndarray, " n"]
    density: Float[np.ndarray, " m"]
    coverage: Bool[np.ndarray, " n"]


def neighbours(real: Float[np.ndarray, "n features"], generated: Float[np.ndarray, "m features"], k: int) -> Neighbours:
    """Precision, recall, density and coverage of each picture.

    real, generated: (N, D) and (M, D), features.
    k: number of neighbours. 3 is usual for the first two, 5 for the others.
    """
    if k >= min(len(real), len(generated)):
        raise ValueError(f"the {k}-th neighbour needs more than {k} pictures, got {len(real)} and {len(generated)}")
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    real_radii, generated_radii = (_radii(features, k) for features in (real, generated))
    recalled, covered = np.zeros((2, len(real)), bool)
    num_balls = np.zeros(len(generated), int)
    for rows, distances in _blocks(real, generated):
        recalled[rows] = (distances <= generated_radii).any(axis=1)
        in_real_ball = distances <= real_radii[rows, None]
        covered[rows] = in_real_ball.any(axis=1)
        num_balls += in_real_ball.sum(axis=0)
    return Neighbours(num_balls > 0, recalled, num_balls / k, covered)


def nearest(real: Float[np.ndarray, "n features"], pictures: Float[np.ndarray, "m features"], count: int) -> np.ndarray:
    """The real pictures that are nearest to each picture: their indices (M, count), the nearest first."""
    closest = [np.argsort(distances, axis=1)[:, :count] for _, distances in _blocks(pictures, real)]
    return np.concatenate(closest)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th neighbour among the others."""
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _blocks(x, x)])


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of x at a time, and their distances to all of y."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        squares = (x[rows] ** 2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x[rows] @ y.T
        yield rows, np.sqrt(np.maximum(squares, 0))


def jackknife(statistic: Callable[[Sequence], float], groups: Sequence) -> Estimate:
    """The statistic of all groups. Its standard error is that of leaving out one group at a time (Efron & Stein 1981,
    eq. 1.2, for groups).

    statistic: of some groups of a set of pictures, each as large as the others.
    """
    leave_one_out = np.array([statistic([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))])
    return Estimate(statistic(groups), float(np.sqrt((len(groups) - 1) * leave_one_out.var())))


def total(parts: Sequence[Moments] | Sequence[Guesses]) -> Moments | Guesses:
    """The sum over all parts."""
    return functools.reduce(operator.add, parts)
