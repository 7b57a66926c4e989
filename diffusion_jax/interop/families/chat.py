"""What families share that read prompts by Qwen3, each as what a user says in a chat."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from tokenizers import Tokenizer

from diffusion_jax.interop import encoders
from diffusion_jax.interop.components import TEXT_ENCODER, TOKENS
from diffusion_jax.interop.family import Component, Config, Prompt, Tensors
from diffusion_jax.models.text.encoder import tokenize
from diffusion_jax.models.text.qwen3 import Qwen3Encoder

WEIGHT = re.compile(r"\([^()]*[^()\d\s]\s*:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)")  # not the time in (at 16:30)
SHOWN = 60  # letters of a prompt in a message


def reader(states: Sequence[int]) -> Component:
    """Qwen3 as a part of a pipeline.

    states: those that are the text, joined on channels, in order of the layers: 0 is before the first layer, -1 after
      the last one. Layers after them are not loaded.
    """

    def build(config: Config, source: str | Path) -> tuple[Qwen3Encoder, PyTree]:
        encoder, _ = encoders.text_encoder_of(config, source)
        least = max(i if i >= 0 else -1 - i for i in states)
        if not isinstance(encoder, Qwen3Encoder) or encoder.num_hidden_layers < least:
            raise ValueError(f"{source}: expected Qwen3 with at least {least} layers")
        encoder = encoder.clone(outputs=tuple(range(encoder.num_hidden_layers + 1)[i] for i in states))
        return encoder, encoders.shapes_of(encoder)

    return TEXT_ENCODER._replace(
        build=build,
        tensors=_used,
        save=None,
        depth=2,
        inputs=_inputs,
        run=lambda model, inputs: model(inputs["ids"].long(), attention_mask=inputs["mask"]),
        qualified=lambda path: path,
    )


def prompt(answer: str, masked: bool) -> Prompt:
    """How Qwen3 reads prompts, which are plain text.

    answer: how the answer begins, after the words of the user.
    masked: whether the denoiser is told which tokens are padding. Otherwise it attends to them too.
    """
    return Prompt(
        embed=_embed,
        tokens=functools.partial(_prompts, answer=answer),
        length=512,  # to which `load_tokenizer` fills up
        captions=functools.partial(chats, answer=answer, warn=False),
        added=lambda masks, size: {"mask": masks[0]} if masked else {},
    )


def chats(
    texts: Sequence[str], tokenizers: Sequence[Tokenizer], answer: str, warn: bool = True
) -> list[tuple[Int[np.ndarray, "batch 1 _"], Float[np.ndarray, "batch 1 _"]]]:
    """Token ids of texts, each as what a user says to Qwen3; weight 0 is padding.

    answer: as of `prompt`.
    warn: whether to warn of texts that are cut.
    """
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{answer}" for text in texts]
    of_each = [tokenize(chats, tokenizer, tokenizer.padding["length"], warn) for tokenizer in tokenizers]
    return [(ids[:, None], mask[:, None].astype(np.float32)) for ids, mask in of_each]


def _prompts(prompts: Sequence[str], tokenizers: Sequence[Tokenizer], answer: str):
    """`chats` of prompts. Raises ValueError for the weights of other families."""
    for text in prompts:
        if found := WEIGHT.search(text):
            raise ValueError(
                f"prompt: {found[0][:SHOWN]} is a weight, and this model reads plain text: leave out the brackets and "
                "the number"
            )
    return chats(prompts, tokenizers, answer)


def _used(tensors: Tensors, encoder: Qwen3Encoder) -> Tensors:
    named, whole = encoders.canonical(tensors, encoder), encoders.shapes_of(encoder.clone(outputs=None))
    return encoders.part_of(named, whole, encoders.shapes_of(encoder))


def _inputs(encoder: Qwen3Encoder) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(encoder.vocab_size, size=(1, TOKENS))
    return {"ids": jnp.asarray(ids), "mask": jnp.arange(TOKENS)[None] < TOKENS - 3}


def _embed(encoder: Qwen3Encoder, variables: PyTree, ids: Array, weights: Array) -> tuple[Array, Array]:
    """The mask of the tokens, and the text."""
    mask = weights.reshape(ids.shape) > 0
    return mask, encoder.apply(variables, ids, mask)
