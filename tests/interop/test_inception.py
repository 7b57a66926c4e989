"""FID's Inception-v3 against torch-fidelity's, on the same random weights and pixels."""

import jax
import numpy as np
import pytest

from diffusion_jax.interop.inception import load_inception
from diffusion_jax.interop.tensors import write_file
from diffusion_jax.models.inception import inception
from tests import fidelity


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """torch-fidelity's network with random weights, and their file."""
    module = fidelity.module(monkeypatch, "feature_extractor_inceptionv3")
    torch = module.torch
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: None)
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path="x")
    for name, tensor in network.state_dict().items():
        if "bn." in name and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    path = tmp_path / "inception.safetensors"
    write_file(path, {name: tensor.numpy() for name, tensor in network.state_dict().items()})
    return network, torch, path


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (299, 299), (320, 256)])
def test_features_equal_the_peers(peer, size):
    network, torch, path = peer
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = [x.numpy() for x in network(torch.from_numpy(images.transpose(0, 3, 1, 2)))]
    found = jax.jit(inception)(load_inception(path), images)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_another_file_is_named(tmp_path):
    write_file(tmp_path / "other.safetensors", {"a.conv.weight": np.zeros((1, 1, 1, 1))})
    with pytest.raises(ValueError, match=r"no weights of FID's Inception-v3: expected 94 convolutions .* got 1"):
        load_inception(tmp_path / "other.safetensors")
