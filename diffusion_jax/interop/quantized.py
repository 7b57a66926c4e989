"""Weights in float8 with scales, in the layout of ComfyUI, as tensors of their real values.

map.weight          float8_e4m3fn or float8_e5m2
map.weight_scale    its factor: one number, or one for each row; map.scale_weight in older files
map.input_scale     of activations, for multiplications in float8, which are not made here; also map.scale_input
map.comfy_quant     bytes of a JSON object: its format. Or all formats are in the header: _quantization_metadata
scaled_fp8          marks older files
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

FORMATS = {name: np.dtype(getattr(jnp, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
SCALES = (".weight_scale", ".scale_weight")
FORMAT = ".comfy_quant"
HEADER = "_quantization_metadata"
WITHOUT_EFFECT = re.compile(r"(^|\.)scaled_fp8$|\.(input_scale|scale_input)$")  # on weights
INERT_SETTINGS = ("format", "full_precision_matrix_mult")


@dataclass(frozen=True)
class Scaled:
    """weight · scale, which is computed when it is made an array: as float32.

    weight: (rows, …), of float8.
    scale: () or (rows, 1, …), float32.
    """

    weight: np.ndarray
    scale: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape

    def __getitem__(self, rows: Any) -> "Scaled":
        return Scaled(self.weight[rows], self.scale[rows] if self.scale.ndim else self.scale)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return (self.weight.astype(np.float32) * self.scale).astype(dtype or np.float32, copy=False)


Tensor = np.ndarray | Scaled


def dequantized(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file without those that say how weights are stored.

    header: metadata of the file.
    Raises ValueError naming the map of a weight that is stored in another way, or whose scale does not fit.
    """
    formats = _formats(tensors, header)
    for layer, settings in formats.items():
        unknown = [name for name, value in settings.items() if name not in INERT_SETTINGS and value]
        if settings.get("format") not in [*FORMATS] or unknown:
            raise ValueError(
                f"{layer} is quantized as {json.dumps(settings)}; supported are {' and '.join(FORMATS)} with a scale"
            )
    scales = {name[: -len(end)]: tensor for name, tensor in tensors.items() for end in SCALES if name.endswith(end)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if WITHOUT_EFFECT.search(name) or name.endswith((*SCALES, FORMAT)):
            continue
        layer = name.removesuffix(".weight")
        if layer in formats and tensor.dtype == np.uint8:
            tensor = tensor.view(FORMATS[formats[layer]["format"]])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {tensor.dtype}: its quantization is not supported, only {' and '.join(FORMATS)} are"
            )
        if layer in scales and name != layer:
            tensor = _scaled(layer, tensor, scales.pop(layer))
        elif layer in formats and name != layer:
            raise ValueError(f"{layer} is quantized as {formats[layer]['format']}, and its {SCALES[0][1:]} is missing")
        found[name] = tensor
    if scales:
        raise ValueError(f"{min(scales)} has a scale and no weight")
    return found


def _formats(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """The settings of each quantized map."""
    texts = {
        name.removesuffix(FORMAT): tensor.tobytes().rstrip(b"\0")
        for name, tensor in tensors.items()
        if name.endswith(FORMAT)
    }
    try:
        formats = json.loads(header[HEADER])["layers"] if HEADER in header else {}
        formats = {**formats, **{layer: json.loads(text) for layer, text in texts.items()}}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"malformed {HEADER} in its header, or a malformed {FORMAT[1:]}") from None
    odd = next((layer for layer, settings in formats.items() if not isinstance(settings, dict)), None)
    if odd is not None:
        raise ValueError(f"{odd} is quantized as {formats[odd]!r}; expected a JSON object with its format")
    return formats


def _scaled(layer: str, weight: np.ndarray, scale: np.ndarray) -> Tensor:
    if weight.dtype not in FORMATS.values():
        raise ValueError(f"{layer} has a scale and a weight of {weight.dtype}; expected one of {', '.join(FORMATS)}")
    if not jnp.issubdtype(scale.dtype, jnp.floating) or scale.size not in (1, len(weight)):
        raise ValueError(
            f"{layer} has a scale of shape {scale.shape} and type {scale.dtype}, its weight {weight.shape}: expected "
            "one number, or one for each row"
        )
    shape = () if scale.size == 1 else (len(weight), *(1,) * (weight.ndim - 1))
    return Scaled(weight, scale.astype(np.float32).reshape(shape))
