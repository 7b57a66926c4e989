"""Text encoders: one seam from prompts to an embedding for each token, whatever network stands behind it."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer


class TextEncoder(NamedTuple):
    """How prompts become what a denoiser attends to.

    tokenize: prompts -> (ids (B, L) int32, mask (B, L) bool, False on padding); cuts long prompts with a warning.
    apply: (params, ids, mask) -> embeddings (B, L, D) float32, pure.
    params: its weights, as `apply` takes them.
    length: L, tokens of a prompt.
    width: D, channels of an embedding.
    name: identifies the encoder and its length, used in cache keys.
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
            len(cut), len(prompts), length, textwrap.shorten(cut[0], 80, placeholder=" ..."),
        )  # fmt: skip
    ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, length)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, length)
    return ids, mask
