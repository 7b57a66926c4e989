"""Learned words of text encoders (textual inversion, Gal et al. 2022): a word stands for one or several vectors.

    {"<cat-toy>": (width,) or (count, width)}             diffusers; the word is the name of the tensor
    {"emb_params": …}, {"clip_l": …, "clip_g": …}         kohya; the word is the name of the file
    {"text_encoders_0": …, "text_encoders_1": …}          diffusers' pivotal tuning, likewise
    {"name": …, "string_to_param": {"*": …}}              web interfaces, a pickle; the word is the name of the file,
                                                          and the name inside, as in diffusers, unless it is taken

The vectors become rows of the token embedding, and the word a token. Further vectors are the tokens word_1, word_2, …,
as in diffusers; `prompts.spelled` puts them after their word.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tokenizers import AddedToken, Tokenizer

from diffusion_jax import paths
from diffusion_jax.interop import families
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.pickled import state_dict
from diffusion_jax.interop.pipeline import Part, PublishedPipeline
from diffusion_jax.interop.prompts import is_syntax
from diffusion_jax.interop.tensors import check_finite, read_file
from diffusion_jax.models.text.clip import OLD_EOS
from diffusion_jax.paths import Path

TABLE = "token_embedding"  # module of a text encoder
NAMELESS = ("*", "string_to_param.*")  # names of tensors in pickles of web interfaces, and of files made of them
WEIGHTS = (".weight", ".bias", ".alpha")  # ends of names in LoRAs and in whole networks


def add_embeddings(
    pipeline: PublishedPipeline, path: str | Path, word: str = "", allow_pickle: bool = False
) -> PublishedPipeline:
    """The pipeline with the words of a file. Prompts and captions use them by name, in any case of letters.

    word: another name for the word of the file.
    allow_pickle: see `read_file`.
    Raises FileNotFoundError, and ValueError for a file without learned words, for words that exist already, and for
    vectors that a text encoder of the pipeline lacks or cannot read.
    """
    family, path = pipeline.family, paths.at(path)
    if len(pipeline.tokenizers) != len(pipeline.text_encoders) or not pipeline.tokenizers:
        raise ValueError(f"{path}: learned words need the tokenizers of the model; name a folder that has them")
    encoders = [name for name in family.tokenizers if name in pipeline.parts]
    parts, tokenizers = dict(pipeline.parts), list(pipeline.tokenizers)
    words, name_inside = _words(path, family, encoders, word, allow_pickle)
    is_new = name_inside.lower() != path.stem.lower()
    if is_new and not any(_objection(name_inside, 1, tokenizer) for tokenizer in tokenizers):
        words[name_inside] = words[path.stem]
    for name, vectors in words.items():
        for i, encoder in enumerate(encoders):
            if encoder not in vectors:
                raise ValueError(
                    f"{path}: {name} has no vectors for {encoder} of {family.name}; it was made for another model"
                )
            try:
                parts[encoder], tokenizers[i] = _with_word(parts[encoder], tokenizers[i], name, vectors[encoder])
            except ValueError as error:
                raise ValueError(f"{path}: {name} {error}") from None
    return pipeline._replace(parts=parts, tokenizers=tuple(tokenizers))


def _words(
    path: Path, family: Family, encoders: list[str], word: str, allow_pickle: bool
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """word -> text encoder -> vectors, (count, width), and the name inside of a pickle of a web interface, or ""."""
    names, name_inside = family.embeddings, ""

    def select(content: Any) -> Mapping[str, Any]:
        """A pickle of a web interface as a dict of words."""
        nonlocal name_inside
        if not isinstance(content, Mapping):
            return {word or path.stem: content}
        if "string_to_param" not in content:
            return state_dict(content)
        params = content["string_to_param"]
        if len(params) != 1:
            raise ValueError(f"expected one learned word in string_to_param, got {len(params)}")
        name_inside = "" if word else str(content.get("name") or "")
        return {word or path.stem: next(iter(params.values()))}

    tensors = read_file(path, allow_pickle, select)
    if not tensors:
        raise ValueError(f"{path}: expected learned words of textual inversion, got a file without tensors")
    for name, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or name.endswith(WEIGHTS):
            raise ValueError(
                f"{path}: expected learned words of textual inversion, a few vectors each, got {name} of shape "
                f"{tensor.shape}"
            )
        check_finite(name, tensor, path)
    vectors = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
    if vectors.keys() <= names.keys():
        if len({names[name] for name in vectors}) < len(vectors):
            raise ValueError(f"{path}: expected one name for each text encoder, got {', '.join(sorted(vectors))}")
        if len({len(rows) for rows in vectors.values()}) > 1:
            counts = ", ".join(f"{len(rows)} of {name}" for name, rows in sorted(vectors.items()))
            raise ValueError(f"{path}: expected as many vectors for each text encoder, got {counts}")
        return {word or path.stem: {names[name]: rows for name, rows in vectors.items()}}, name_inside
    if not vectors.keys().isdisjoint(name for other in families.FAMILIES for name in other.embeddings):
        raise ValueError(
            f"{path}: its vectors are named {', '.join(sorted(vectors))}, and {family.name} reads {', '.join(names)}; "
            "it was made for another model"
        )
    if word and len(vectors) > 1:
        raise ValueError(f"{path} has the words {', '.join(sorted(vectors))}: only a single one can be called {word}")
    stems = {name: path.stem if name in NAMELESS else name for name in vectors}
    return {word or stems[name]: {encoders[0]: rows} for name, rows in vectors.items()}, name_inside


def _objection(word: str, count: int, tokenizer: Tokenizer) -> str:
    """Why a word of `count` vectors cannot be learned: prompts cannot contain it, or its tokens cannot be told from
    those that exist, or it is a part of other words. "" if it can.
    """
    names = {word.lower(), *(f"{word}_{i}".lower() for i in range(1, count + 1))}  # tokenizers see lower case
    taken = {token.content.lower() for token in tokenizer.get_added_tokens_decoder().values()}
    if not word.strip() or is_syntax(word):
        return "means something else in prompts; call it by another name"
    if not taken.isdisjoint(names) or any(tokenizer.token_to_id(name) is not None for name in names):
        return "is a token of the model already, or the beginning of one; call it by another name"
    return ""


def _with_word(part: Part, tokenizer: Tokenizer, word: str, vectors: np.ndarray) -> tuple[Part, Tokenizer]:
    """The text encoder with the vectors as further rows of its token embedding, and the tokenizer with the word."""
    names = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    objection = _objection(word, len(vectors), tokenizer)
    if objection:
        raise ValueError(objection)
    if vectors.shape[-1] != part.module.hidden_size or 0 in vectors.shape:
        raise ValueError(
            f"has vectors of shape {vectors.shape}, but the text encoder reads {part.module.hidden_size} numbers each; "
            "it was made for another model"
        )
    end = tokenizer.encode("").ids[1]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    is_word = word[0].isalnum() and word[-1].isalnum()  # else it may stand beside letters, as <word>s
    tokenizer.add_tokens([AddedToken(name, single_word=is_word, normalized=True) for name in names])
    ids = [tokenizer.token_to_id(name) for name in names]
    size = max(part.module.vocab_size, max(ids) + 1)

    def grown(keys: tuple, leaf: PyTree) -> PyTree:
        if len(keys) < 2 or keys[-2].key != TABLE:
            return leaf
        rows = jnp.zeros((size - leaf.shape[0], leaf.shape[-1]), leaf.dtype)
        return jnp.concatenate([jnp.asarray(leaf), rows]).at[np.array(ids)].set(jnp.asarray(vectors, leaf.dtype))

    ends = {"eos_token_id": end} if part.module.eos_token_id == OLD_EOS else {}  # the largest id no longer ends a text
    module = part.module.clone(vocab_size=size, **ends)
    return Part(module, jax.tree_util.tree_map_with_path(grown, part.params)), tokenizer
