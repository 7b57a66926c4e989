"""The weights of FID's Inception-v3 from a file that the user names."""

import numpy as np

from diffusion_jax import paths
from diffusion_jax.interop.graph import read_constants
from diffusion_jax.interop.tensors import read_file
from diffusion_jax.models.vision.inception import EPS
from diffusion_jax.paths import Path

FOLDERS = {  # of the TensorFlow graph -> block of torch-fidelity
    "mixed": "Mixed_5b", "mixed_1": "Mixed_5c", "mixed_2": "Mixed_5d", "mixed_3": "Mixed_6a", "mixed_4": "Mixed_6b",
    "mixed_5": "Mixed_6c", "mixed_6": "Mixed_6d", "mixed_7": "Mixed_6e", "mixed_8": "Mixed_7a", "mixed_9": "Mixed_7b",
    "mixed_10": "Mixed_7c",
}  # fmt: skip
STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
TOWERS = {  # kind of block -> tower in TensorFlow -> branch in torch-fidelity; "" is the convolution outside of towers
    "5": {"": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"},
    "6a": {"": "branch3x3", "tower": "branch3x3dbl"},
    "6": {"": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl", "tower_2": "branch_pool"},
    "7a": {"tower": "branch3x3", "tower_1": "branch7x7x3"},
    "7": {"": "branch1x1", "tower": "branch3x3", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"},
}


def load_inception(path: str | Path, allow_pickle: bool = False) -> dict:
    """The weights as `models.vision.inception.inception` takes them, from the file of torch-fidelity or pytorch-fid
    (`pt_inception-2015-12-05-6726825d.pth`, also as .safetensors), or from the original graph of TensorFlow
    (`classify_image_graph_def.pb`).

    allow_pickle: read a .pth file, of which only tensors are read.
    Raises FileNotFoundError, and ValueError for a file of another network.
    """
    tensors = _graph_tensors(path) if paths.at(path).suffix == ".pb" else read_file(path, allow_pickle)
    names = sorted(name.removesuffix(".conv.weight") for name in tensors if name.endswith(".conv.weight"))
    if len(names) != 94 or "fc.weight" not in tensors:
        raise ValueError(
            f"{path} has no weights of FID's Inception-v3: expected 94 convolutions and fc.weight, got {len(names)} "
            "convolutions"
        )
    params = {name: _folded(tensors, name) for name in names}
    return params | {"fc": {"kernel": np.asarray(tensors["fc.weight"], np.float32).T}}


def _graph_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The constants of the TensorFlow graph, with names and axes as in the file of torch-fidelity."""
    parts = {"beta": "bias", "gamma": "weight", "moving_mean": "running_mean", "moving_variance": "running_var"}
    tensors = {}
    for name, values in read_constants(path).items():
        place, _, part = name.rpartition("/")
        if name == "softmax/weights":
            tensors["fc.weight"] = values.T
        elif part == "conv2d_params":
            tensors[f"{_module(place)}.conv.weight"] = values.transpose(3, 2, 0, 1)
        elif place.endswith("/batchnorm") and part in parts:
            tensors[f"{_module(place.removesuffix('/batchnorm'))}.bn.{parts[part]}"] = values
    return tensors


def _module(place: str) -> str:
    """The name of a convolution in torch-fidelity: "mixed_9/tower/mixed/conv_1" is "Mixed_7b.branch3x3_2b"."""
    if place in STEM:
        return STEM[place]
    folder, *inside, conv = place.split("/")
    block = FOLDERS.get(folder, folder)
    kind = block.removeprefix("Mixed_")
    towers = TOWERS[kind if kind in TOWERS else kind[0]] if folder in FOLDERS else {}
    branch = towers.get(inside[0] if inside else "", "")
    if not inside or branch == "branch_pool":
        return f"{block}.{branch}"
    number = int(conv.removeprefix("conv").lstrip("_") or 0)
    if inside[1:]:  # two convolutions of one input
        before = {"branch3x3": 1, "branch3x3dbl": 2}[branch]
        return f"{block}.{branch}_{before + 1}{'ab'[number]}"
    return f"{block}.{branch}_{number + 1}"


def _folded(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The convolution with the batch normalization that follows it."""
    scale, shift, mean, variance = (
        np.asarray(tensors[f"{name}.bn.{key}"], np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(variance + EPS)
    kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}
