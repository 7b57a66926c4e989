"""The weights of FID's Inception-v3 from a file that the user names."""

from pathlib import Path

import numpy as np

from diffusion_jax.interop.tensors import read_file
from diffusion_jax.models.inception import EPS


def load_inception(path: str | Path, allow_pickle: bool = False) -> dict:
    """The weights of torch-fidelity or pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`, also as .safetensors), as
    `models.inception.inception` takes them.

    allow_pickle: read a .pth file, of which only tensors are read.
    Raises FileNotFoundError, and ValueError for a file of another network.
    """
    tensors = read_file(path, allow_pickle)
    names = sorted(name.removesuffix(".conv.weight") for name in tensors if name.endswith(".conv.weight"))
    if len(names) != 94 or "fc.weight" not in tensors:
        raise ValueError(
            f"{path} has no weights of FID's Inception-v3: expected 94 convolutions and fc.weight, got {len(names)} "
            "convolutions"
        )
    params = {name: _folded(tensors, name) for name in names}
    return params | {"fc": {"kernel": np.asarray(tensors["fc.weight"], np.float32).T}}


def _folded(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The convolution with the batch normalization that follows it."""
    scale, shift, mean, variance = (
        np.asarray(tensors[f"{name}.bn.{of}"], np.float64) for of in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(variance + EPS)
    kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}
