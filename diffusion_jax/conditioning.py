"""The condition of a denoiser: none, a class, or a text."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from diffusion_jax.data.transforms import Record
from diffusion_jax.models.text.encoder import TextEncoder


class Conditioning(NamedTuple):
    """Records and prompts -> the condition of the denoiser.

    cache_key: () -> identifies the weights, part of the key of cached records; "" if caching does not pay.
    of_records: stacked records -> inputs of `embed`, such as tokens, leaves (B, ...).
    of_prompts: prompts -> cond, leaves (B, ...).
    null: "no condition"; leaves without the batch axis.
    embed: (params, inputs from `of_records`) -> cond. A cond is returned unchanged. A pure function.
    params: weights of `embed`.
    words: learned words that prompts may use (textual inversion), and how many vectors each has.
    for_size: (conditioning, (height, width)) -> the conditioning for images of this size; most do not depend on it.
    """

    cache_key: Callable[[], str]
    of_records: Callable[[Record], PyTree]
    of_prompts: Callable[[Sequence[str]], PyTree]
    null: PyTree
    embed: Callable[[PyTree, PyTree], PyTree] = lambda params, inputs: inputs
    params: PyTree = None
    words: Mapping[str, int] = MappingProxyType({})
    for_size: Callable[["Conditioning", tuple[int, int]], "Conditioning"] = lambda conditioning, size: conditioning


def unconditional() -> Conditioning:
    """No condition. The number of prompts sets the number of images."""
    return Conditioning(lambda: "", lambda records: {}, lambda prompts: {}, {})


def class_labels(num_classes: int) -> Conditioning:
    """Class numbers 0..num_classes-1, also as prompts. The null class is num_classes."""

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        invalid = [p for p in prompts if not (p.isascii() and p.strip().isdecimal() and int(p) < num_classes)]
        if invalid:
            raise ValueError(f"this model knows classes: expected a number in 0..{num_classes - 1}, got {invalid[0]!r}")
        return {"label": np.array([int(p) for p in prompts], np.int32)}

    return Conditioning(
        lambda: "", lambda records: {"label": records["label"]}, of_prompts, {"label": np.int32(num_classes)}
    )


def text(encoder: TextEncoder, pooled: bool = False) -> Conditioning:
    """Captions through a text encoder: an embedding for each token and the mask of tokens. null is the empty prompt.

    Records give tokens, which are embedded in the cache, or in the training step if a record has several captions.

    pooled: add one vector for the whole text, "text_embeds": the mean over tokens, its values of mean square 1.
    """

    def tokens(prompts: Sequence[str]) -> PyTree:
        ids, mask = encoder.tokenize(prompts)
        return {"ids": ids, "mask": mask}

    @jax.jit
    def embed(params: PyTree, inputs: PyTree) -> PyTree:
        if "text" in inputs:
            return inputs
        cond = {"text": encoder.apply(params, inputs["ids"], inputs["mask"]), "mask": inputs["mask"]}
        return cond | ({"text_embeds": _pooled(**cond)} if pooled else {})

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        return jax.tree.map(np.asarray, embed(encoder.params, tokens(prompts)))

    return Conditioning(
        cache_key=lambda: f"{encoder.name}{' pooled' * pooled}",
        of_records=lambda records: tokens(list(records["caption"])),
        of_prompts=of_prompts,
        null=jax.tree.map(lambda leaf: leaf[0], of_prompts([""])),
        embed=embed,
        params=encoder.params,
    )


def _pooled(text: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]) -> Float[Array, "batch width"]:
    total = jnp.sum(text, axis=1, where=mask[..., None])
    return total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True)).clip(1e-6)
