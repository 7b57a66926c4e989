"""The condition of a denoiser: none, a class, or a text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tokenizers import Tokenizer

from diffusion_jax.data.transforms import Record
from diffusion_jax.models.text.encoder import TextEncoder

OfPrompts = Callable[[Sequence[str]], PyTree]  # prompts -> cond, leaves (B, ...)
EMBEDDINGS = ("text", "text_embeds")  # the leaves of a cond that text encoders make


class Conditioning(NamedTuple):
    """Records and prompts -> the condition of the denoiser.

    cache_key: () -> identifies the weights, part of the key of cached records. None if records should not be cached.
    of_records: stacked records -> inputs of `embed`, such as tokens, or a cond, leaves (B, ...).
    of_prompts: prompts -> cond, leaves (B, ...).
    null: "no condition"; leaves without the batch axis.
    embed: (params, inputs from `of_records`) -> cond. A cond is returned in float32, see `stored`. A pure function.
    params: () -> weights of `embed`. The call may load them.
    words: learned words that prompts may use (textual inversion), and how many vectors each has.
    for_size: (conditioning, (height, width)) -> the conditioning for images of this size; most do not depend on it.
    tokenizers: () -> the tokenizers of captions, which cut long ones, by name.
    weights: variables of the text encoders, or their shapes, which `of_prompts` takes to a device.
    release: () -> None. Frees the memory of that device. The next prompt takes the weights there again.
    sizes: the leaf of cond with original size, corner of the crop and size of each image, (B, 6) float32, see
      `data.crops.crop`. "" if the network does not read them. Training keeps it where it drops the condition.
    """

    cache_key: Callable[[], str] | None
    of_records: Callable[[Record], PyTree]
    of_prompts: OfPrompts
    null: PyTree
    embed: Callable[[PyTree, PyTree], PyTree] = lambda params, inputs: _in_float32(inputs)
    params: Callable[[], PyTree] = lambda: None
    words: Mapping[str, int] = MappingProxyType({})
    for_size: Callable[["Conditioning", tuple[int, int]], "Conditioning"] = lambda conditioning, size: conditioning
    tokenizers: Callable[[], Mapping[str, Tokenizer]] = dict
    weights: PyTree = ()
    release: Callable[[], None] = lambda: None
    sizes: str = ""

    def with_sizes(self, cond: PyTree, cropped: Record) -> PyTree:
        """cond with the true sizes of pictures, if the network reads them.

        cropped: stacked records with "sizes", (B, 6), or one with (6,).
        """
        return cond | {self.sizes: cropped["sizes"].astype(np.float32)} if self.sizes else cond


def unconditional() -> Conditioning:
    """No condition. The number of prompts sets the number of images."""
    return Conditioning(None, lambda records: {}, lambda prompts: {}, {})


def class_labels(num_classes: int, names: Mapping[str, int] = MappingProxyType({})) -> Conditioning:
    """Class numbers 0..num_classes-1, also as prompts. The null class is num_classes.

    names: of classes, which prompts may have instead.
    """

    def of_prompt(prompt: str) -> int:
        if prompt.strip() in names:
            return names[prompt.strip()]
        if not (prompt.isascii() and prompt.strip().isdecimal() and int(prompt) < num_classes):
            named = f", or a name such as {next(iter(names))!r}" if names else ""
            raise ValueError(
                f"this model knows classes: expected a number in 0..{num_classes - 1}{named}, got {prompt!r}"
            )
        return int(prompt)

    return Conditioning(
        cache_key=None,
        of_records=lambda records: {"label": records["label"]},
        of_prompts=lambda prompts: {"label": np.array([*map(of_prompt, prompts)], np.int32)},
        null={"label": np.int32(num_classes)},
    )


def text(
    load: Callable[[], Sequence[TextEncoder]],
    cache_key: Callable[[], str],
    on_tokens: bool = False,
    null_is_zeros: bool = False,
    keep: Callable[[OfPrompts], OfPrompts] = lambda of_prompts: of_prompts,
    tokenizers: Callable[[], Mapping[str, Tokenizer]] = dict,
) -> Conditioning:
    """A condition of captions, by one or several text encoders.

    It has the leaves "text", an embedding for each token; "mask", the mask of tokens; and "text_embeds", the
    concatenated vectors of the encoders with `pooled`.

    Records give tokens, which are embedded in the cache, or in the training step if a record has several captions.

    load: () -> the encoders. Called once, when they are first needed; embedded records and kept prompts need none.
    cache_key: as of `Conditioning`.
    on_tokens: several encoders join one after the other, narrower ones filled up with zeros (as in Stable Diffusion 3,
      Esser et al. 2024). Otherwise they join token by token (as in Stable Diffusion XL, Podell et al. 2023).
    null_is_zeros: "no condition" is zeros, and not the empty prompt.
    keep: (prompts -> cond) -> the same function, which may keep what it has computed.
    tokenizers: as of `Conditioning`. Loads no encoder.
    Raises ValueError for encoders of different lengths that join token by token, and the errors of `load`.
    """
    encoders = functools.cache(lambda: _joinable(load(), on_tokens))

    def tokens(prompts: Sequence[str], warn: bool) -> PyTree:
        pairs = (encoder.tokenize(prompts, warn=warn) for encoder in encoders())
        return {str(i): {"ids": ids, "mask": mask} for i, (ids, mask) in enumerate(pairs)}

    @jax.jit
    def embed(params: PyTree, inputs: PyTree) -> PyTree:
        if "text" in inputs:
            return _in_float32(inputs)
        parts = [inputs[str(i)] for i in range(len(encoders()))]
        embeddings = [
            encoder.apply(weights, part["ids"], part["mask"])
            for encoder, weights, part in zip(encoders(), params, parts, strict=True)
        ]
        join = _one_after_the_other if on_tokens else _token_by_token
        cond = join([embedding.tokens for embedding in embeddings], [part["mask"] for part in parts])
        pooled = [part.vector for encoder, part in zip(encoders(), embeddings, strict=True) if encoder.pooled]
        return cond | ({"text_embeds": jnp.concatenate(pooled, axis=-1)} if pooled else {})

    def params() -> PyTree:
        return tuple(encoder.params for encoder in encoders())

    of_prompts = keep(lambda prompts: jax.tree.map(np.asarray, embed(params(), tokens(prompts, warn=True))))
    null = jax.tree.map(lambda leaf: leaf[0], of_prompts([""]))
    if null_is_zeros:
        null = {name: np.ones_like(leaf) if name == "mask" else np.zeros_like(leaf) for name, leaf in null.items()}
    return Conditioning(
        cache_key=cache_key,
        of_records=lambda records: tokens(list(records["caption"]), warn=False),
        of_prompts=of_prompts,
        null=null,
        embed=embed,
        params=params,
        tokenizers=tokenizers,
    )


def _joinable(encoders: Sequence[TextEncoder], on_tokens: bool) -> Sequence[TextEncoder]:
    """The encoders. Raises ValueError for different lengths that join token by token."""
    if not on_tokens and len({encoder.length for encoder in encoders}) > 1:
        lengths = " and ".join(str(encoder.length) for encoder in encoders)
        raise ValueError(f"text encoders that join token by token need the same length, got {lengths} tokens")
    return encoders


def stored(cond: PyTree) -> PyTree:
    """A cond as a cache keeps it: embeddings of texts in bfloat16, which is half the size.

    Numbers that count, such as the sizes of an image in pixels, would change, so they stay as they are.
    """
    return {name: leaf.astype(jnp.bfloat16) if name in EMBEDDINGS else leaf for name, leaf in cond.items()}


def _in_float32(cond: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, cond)


def _token_by_token(texts: Sequence[Array], masks: Sequence[Array]) -> PyTree:
    return {"text": jnp.concatenate(texts, axis=-1), "mask": functools.reduce(jnp.logical_or, masks)}


def _one_after_the_other(texts: Sequence[Array], masks: Sequence[Array]) -> PyTree:
    width = max(text.shape[-1] for text in texts)
    filled = [jnp.pad(text, ((0, 0), (0, 0), (0, width - text.shape[-1]))) for text in texts]
    return {"text": jnp.concatenate(filled, axis=1), "mask": jnp.concatenate(masks, axis=1)}
