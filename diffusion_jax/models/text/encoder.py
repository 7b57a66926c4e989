"""Text encoders: one interface from prompts to an embedding for each token, for any network."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int, PyTree
from tokenizers import Tokenizer


class TextEmbedding(NamedTuple):
    """tokens: an embedding for each token. vector: one for the whole text."""

    tokens: Float[Array, "batch length width"]
    vector: Float[Array, "batch features"]


class TextEncoder(NamedTuple):
    """How prompts become the embeddings that a denoiser attends to.

    tokenize: prompts -> (ids (B, L) int32, mask (B, L) bool, False on padding). Cuts long prompts with a warning,
      unless warn=False.
    apply: (params, ids, mask) -> TextEmbedding in float32, a pure function.
    params: the weights, first argument of `apply`.
    length: L, tokens of a prompt.
    width: D, channels of an embedding.
    pooled: whether the vector is part of the condition.
    """

    tokenize: Callable[..., tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]]
    apply: Callable[..., TextEmbedding]
    params: PyTree
    length: int
    width: int
    pooled: bool = False


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, length: int, warn: bool = True
) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Token ids and mask of prompts. The tokenizer must cut and pad to `length`. One warning covers all cut prompts."""
    encodings = tokenizer.encode_batch(list(prompts))
    cut = [prompt for prompt, encoding in zip(prompts, encodings, strict=True) if encoding.overflowing]
    if cut and warn:
        logging.warning(
            'cut %d of %d prompts to %d tokens, the limit of the text encoder; the first: "%s"',
            len(cut), len(prompts), length, textwrap.shorten(cut[0], 80, placeholder=" ..."),
        )  # fmt: skip
    ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, length)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, length)
    return ids, mask


def count_cut(prompts: Sequence[str], tokenizer: Tokenizer) -> int:
    """How many prompts have more tokens than the tokenizer leaves them."""
    return sum(bool(encoding.overflowing) for encoding in tokenizer.encode_batch(list(prompts)))
