"""Distances against their definitions, against known values, and against torch-fidelity on the same features."""

import functools
from importlib import import_module

import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.evaluation import distances
from diffusion_jax.evaluation.distances import (
    frechet,
    guesses,
    inception_score,
    jackknife,
    kernel,
    moments,
    nearest,
    neighbours,
    total,
)
from tests import fidelity


def features(count, dimensions=24, seed=0, shift=0.0):
    """Correlated features, like those of a network."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / dimensions**0.5
    return np.maximum(rng.normal(size=(count, dimensions)) @ mixing + 0.5 + shift, 0)


def test_moments_of_parts_add_up():
    x = features(100) + 1e4
    parts = [moments(part) for part in np.split(x, [1, 40, 55])]
    whole = functools.reduce(lambda a, b: a + b, parts)
    np.testing.assert_allclose(whole.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_frechet_of_gaussians_that_commute_is_known():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b, apart = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 6), rng.normal(size=6)
    first, second = (
        distances.Moments(11, mean, 10 * directions @ np.diag(variances) @ directions.T)
        for mean, variances in ((apart, a), (np.zeros(6), b))
    )
    assert frechet(first, second) == pytest.approx(apart @ apart + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("count", [20, 400])  # fewer and more than there are features
def test_frechet_laws(count):
    a, b = moments(features(count, 64)), moments(features(count, 64, seed=1, shift=0.3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-12 * np.trace(a.covariance))
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12) and frechet(a, b) > 0
    turned = np.linalg.qr(np.random.default_rng(2).normal(size=(64, 64)))[0]
    rotated = [moments(features(count, 64) @ turned), moments(features(count, 64, seed=1, shift=0.3) @ turned)]
    assert frechet(*rotated) == pytest.approx(frechet(a, b), rel=1e-10)


def test_frechet_equals_the_matrix_root():
    a, b = moments(features(300)), moments(features(300, seed=1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_is_unbiased():
    values = [kernel(features(40, 8, seed=i), features(40, 8, seed=i + 1000)).value for i in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5


def test_inception_score_laws():
    sure = np.where(np.arange(10) == np.arange(200)[:, None] % 10, 50.0, 0.0)
    assert inception_score(guesses(sure)) == pytest.approx(10)
    assert inception_score(guesses(np.zeros((5, 10)))) == pytest.approx(1)
    assert inception_score(guesses(1e4 * sure[:5])) == pytest.approx(5)  # probabilities of 0
    parts = [guesses(part) for part in np.split(sure, [3, 50])]
    assert inception_score(total(parts)) == pytest.approx(10)


def test_overlap_by_definition(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    real, generated, k = features(60), features(50, seed=1, shift=0.2), 3
    cross = np.linalg.norm(real[:, None] - generated, axis=-1)
    radii = [np.sort(np.linalg.norm(x[:, None] - x, axis=-1), axis=1)[:, k] for x in (real, generated)]
    overlap = neighbours(real, generated, k)
    np.testing.assert_array_equal(overlap.precision, (cross <= radii[0][:, None]).any(axis=0))
    np.testing.assert_array_equal(overlap.recall, (cross <= radii[1]).any(axis=1))
    np.testing.assert_allclose(overlap.density, (cross <= radii[0][:, None]).sum(axis=0) / k)
    np.testing.assert_array_equal(overlap.coverage, cross.min(axis=1) <= radii[0])
    assert not any(values.any() for values in neighbours(real, real + 100, k))
    np.testing.assert_array_equal(nearest(real, generated, 3), np.argsort(cross, axis=0)[:3].T)


def test_standard_errors_are_the_spread_over_sets():
    """Of the kernel distance to first order, of the jackknife for the mean exactly, and for the Frechet distance."""
    real = features(300, 8, seed=5000, shift=0.5)
    estimates = [kernel(features(60, 8, seed=i), real) for i in range(200)]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.15)

    x = np.random.default_rng(0).normal(size=40)
    of_mean = jackknife(np.mean, list(x))
    assert of_mean.value == x.mean() and of_mean.standard_error == pytest.approx(x.std(ddof=1) / 40**0.5)

    def distance(seed):
        groups = [moments(part) for part in np.split(features(200, 8, seed=seed), 10)]
        return jackknife(lambda some: frechet(total(some), moments(real)), groups)

    estimates = [distance(i) for i in range(60)]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(np.zeros((0, 3))), "at least one picture"),
        (lambda: moments(np.array([[0.0, np.nan], [1, 1]])), "1 of 2 pictures have features that are not finite"),
        (lambda: frechet(moments(features(9, 4)), moments(features(9, 5))), "two networks: 4 and 5"),
        (lambda: frechet(moments(features(1)), moments(features(9))), "at least two pictures, got 1"),
        (lambda: neighbours(features(9), features(3), 3), "needs more than 3 pictures, got 9 and 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "dimensions"), [(3000, 48), (300, 256), (100, 256)])
def test_the_peer_has_the_same_distances(monkeypatch, count, dimensions, dtype):
    fid, kid, prc, isc = (fidelity.module(monkeypatch, f"metric_{name}") for name in ("fid", "kid", "prc", "isc"))
    a, b = (features(count, dimensions, seed, 0.1 * seed).astype(dtype) for seed in (0, 1))
    tensors = [import_module("torch").from_numpy(x.astype(np.float64)) for x in (a, b)]

    statistics = [fid.fid_features_to_statistics(x) for x in tensors]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)

    settings = {"kid_subsets": 5, "kid_subset_size": 80, "rng_seed": 2020, "verbose": False}
    expected = kid.kid_features_to_metric(*tensors, **settings)
    rng = np.random.RandomState(2020)
    subsets = [[x[rng.choice(len(x), 80, replace=False)] for x in (a, b)] for _ in range(5)]
    values = np.array([kernel(*pair).value for pair in subsets])
    assert values.mean() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert values.std() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)

    overlap = neighbours(a, b, 3)
    expected = prc.calculate_precision_recall_full(*reversed(tensors), 3)
    np.testing.assert_allclose((overlap.precision.mean(), overlap.recall.mean()), expected, rtol=1e-6)

    expected = isc.isc_features_to_metric(tensors[0], splits=1, shuffle=False)
    assert inception_score(guesses(a)) == pytest.approx(expected["inception_score_mean"], rel=1e-6)
