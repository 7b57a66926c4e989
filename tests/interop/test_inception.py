"""FID's Inception-v3 against torch-fidelity's, on the same random weights and pixels."""

import itertools

import jax
import numpy as np
import pytest

from diffusion_jax.interop import inception as inception_file
from diffusion_jax.interop.graph import FLOAT, graph_message
from diffusion_jax.interop.inception import load_inception
from diffusion_jax.interop.tensors import read_file, write_file
from diffusion_jax.models.vision.inception import inception
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


CONVOLUTIONS = {  # of the folders of the TensorFlow graph, as published
    ("mixed", "mixed_1", "mixed_2"): ["", "tower 2", "tower_1 3", "tower_2"],
    ("mixed_3",): ["", "tower 3"],
    ("mixed_4", "mixed_5", "mixed_6", "mixed_7"): ["", "tower 3", "tower_1 5", "tower_2"],
    ("mixed_8",): ["tower 2", "tower_1 4"],
    ("mixed_9", "mixed_10"): ["", "tower", "tower/mixed 2", "tower_1 2", "tower_1/mixed 2", "tower_2"],
}
KNOWN = {
    "conv_3": "Conv2d_3b_1x1",
    "mixed_8/tower_1/conv_2": "Mixed_7a.branch7x7x3_3",
    "mixed_9/tower_1/mixed/conv_1": "Mixed_7b.branch3x3dbl_3b",
    "mixed_3/tower/conv": "Mixed_6a.branch3x3dbl_1",
    "mixed_5/tower_2/conv": "Mixed_6c.branch_pool",
}


def places():
    """Where the graph has convolutions."""
    yield from ("conv", *(f"conv_{i}" for i in range(1, 5)))
    for folders, towers in CONVOLUTIONS.items():
        for folder, tower in itertools.product(folders, towers):
            name, _, count = tower.partition(" ")
            for i in range(int(count or 1)):
                yield "/".join(filter(None, (folder, name, "conv" + f"_{i}" * (i > 0))))


def test_the_graph_of_tensorflow_has_the_same_weights(peer, tmp_path):
    """Written with the names, axes and kinds of node of the published graph."""
    _, _, path = peer
    theirs, graph = read_file(path), graph_message()()

    def add(name, values):
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr.add(key="value").value.tensor
        tensor.dtype = FLOAT
        for side in values.shape:
            tensor.tensor_shape.dim.add(size=side)
        tensor.tensor_content = np.ascontiguousarray(values, "<f4").tobytes()

    names = {place: inception_file._module(place) for place in places()}
    assert len(names) == 94 and KNOWN.items() <= names.items()
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    for place, name in names.items():
        add(f"{place}/conv2d_params", theirs[f"{name}.conv.weight"].transpose(2, 3, 1, 0))
        for part, published in parts.items():
            add(f"{place}/batchnorm/{published}", theirs[f"{name}.bn.{part}"])
    add("softmax/weights", theirs["fc.weight"].T)
    add("softmax/biases", theirs["fc.bias"])
    graph.node.add(name="pool_3", op="AvgPool")
    (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
    jax.tree.map(np.testing.assert_array_equal, load_inception(tmp_path / "graph.pb"), load_inception(path))


def test_another_graph_is_named(tmp_path):
    (tmp_path / "torn.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match=r"torn.pb is no frozen TensorFlow graph"):
        load_inception(tmp_path / "torn.pb")
    (tmp_path / "empty.pb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected 94 convolutions and fc.weight, got 0"):
        load_inception(tmp_path / "empty.pb")


def test_another_file_is_named(tmp_path):
    write_file(tmp_path / "other.safetensors", {"a.conv.weight": np.zeros((1, 1, 1, 1))})
    with pytest.raises(ValueError, match=r"no weights of FID's Inception-v3: expected 94 convolutions .* got 1"):
        load_inception(tmp_path / "other.safetensors")
