"""Distances between two sets of pictures, from their features: in float64, equal to the trusted implementations.

Features are (N, D), of any network; a distance means nothing without the network's name beside it. All of these have a
bias that depends on the number of pictures, so compare sets of one size only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

BLOCK = 2048  # rows of distances at a time


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
        """Those of both sets (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def moments(features: Float[np.ndarray, "pictures features"]) -> Moments:
    """The moments of a batch. Raises ValueError for features that are not finite, and for no pictures."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected features (pictures, features) of at least one picture, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{(~np.isfinite(features)).any(axis=1).sum()} of {len(features)} pictures have NaN features")
    mean = features.mean(axis=0)
    return Moments(len(features), mean, (features - mean).T @ (features - mean))


def frechet(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): the Frechet distance of two Gaussians (Dowson & Landau
    1982; FID in the features of Inception-v3, Heusel et al. 2017).

    The last trace is the sum of the singular values of F_a^T F_b with C = F F^T, which is exact also for covariances of
    fewer pictures than features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of two networks: {len(a.mean)} and {len(b.mean)} of them")
    covariances = a.covariance, b.covariance
    factors = [_factor(one) for one in covariances]
    root = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + sum(np.trace(one) for one in covariances) - 2 * root)


def _factor(covariance: Float[np.ndarray, "features features"]) -> Float[np.ndarray, "features rank"]:
    """F with F F^T = covariance, without the directions that are rounding errors."""
    variances, directions = np.linalg.eigh(covariance)
    kept = variances > variances[-1] * len(variances) * np.finfo(np.float64).eps
    return directions[:, kept] * np.sqrt(variances[kept])


def kernel(x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"]) -> float:
    """The squared maximum mean discrepancy of the kernel (x . y / D + 1)^3, without bias (KID, Binkowski et al. 2018,
    section 4). It may be negative.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def mean_of_others(one: np.ndarray) -> float:
        similar = _polynomial(one, one)
        return (similar.sum() - np.trace(similar)) / (len(one) * (len(one) - 1))

    return float(mean_of_others(x) + mean_of_others(y) - 2 * _polynomial(x, y).mean())


def _polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_of_subsets(
    x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"], subsets: int, size: int, seed: int
) -> Float[np.ndarray, " subsets"]:
    """`kernel` of random subsets of `size` pictures of each set, whose mean and deviation are usually reported."""
    if size > min(len(x), len(y)):
        raise ValueError(f"subsets of {size} pictures need as many in both sets, got {len(x)} and {len(y)}")
    rng = np.random.RandomState(seed)  # the generator, and order, of the implementations that papers use
    chosen = ([one[rng.choice(len(one), size, replace=False)] for one in (x, y)] for _ in range(subsets))
    return np.array([kernel(*pair) for pair in chosen])


def inception_score(logits: Float[np.ndarray, "pictures classes"]) -> float:
    """exp of the mean divergence of a picture's classes from those of all pictures (Salimans et al. 2016)."""
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))


class Neighbours(NamedTuple):
    """How two sets overlap, by balls that reach from each picture to its k-th neighbour in its own set.

    precision: part of the generated pictures in a ball of a real one (Kynkaanniemi et al. 2019).
    recall: part of the real pictures in a ball of a generated one.
    density: mean number of balls of real pictures around a generated one, over k (Naeem et al. 2020).
    coverage: part of the real pictures with a generated one in their ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Float[np.ndarray, "n features"], generated: Float[np.ndarray, "m features"], k: int) -> Neighbours:
    """Precision, recall, density and coverage. k: 3 is usual for the first two, 5 for the others."""
    if k >= min(len(real), len(generated)):
        raise ValueError(f"the {k}-th neighbour needs more than {k} pictures, got {len(real)} and {len(generated)}")
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    around_real, around_generated = (_reach(one, k) for one in (real, generated))
    recalled, covered = np.zeros((2, len(real)), bool)
    inside = np.zeros(len(generated), int)
    for rows, distances in _blocks(real, generated):
        recalled[rows] = (distances <= around_generated).any(axis=1)
        near = distances <= around_real[rows, None]
        covered[rows] = near.any(axis=1)
        inside += near.sum(axis=0)
    return Neighbours(*map(float, ((inside > 0).mean(), recalled.mean(), inside.mean() / k, covered.mean())))


def _reach(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th neighbour among the others."""
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _blocks(x, x)])


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of x at a time, and their distances to all of y."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        squares = (x[rows] ** 2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x[rows] @ y.T
        yield rows, np.sqrt(np.maximum(squares, 0))
