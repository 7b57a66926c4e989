"""Text encoders in the folder format of transformers: `config.json` beside `model.safetensors`."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tokenizers import Tokenizer, models

from diffusion_jax import paths
from diffusion_jax.interop.folders import module_and_shapes, read_config
from diffusion_jax.interop.names import from_torch, to_torch
from diffusion_jax.interop.tensors import find_tensors, read_tensors, shards, write_file, write_json
from diffusion_jax.interop.tokenizers import ALL_FILES, FILES, load_tokenizer
from diffusion_jax.models.text.bert import BertEncoder
from diffusion_jax.models.text.clip import OLD_EOS, ClipTextEncoder
from diffusion_jax.models.text.embedding import embedding
from diffusion_jax.models.text.encoder import TextEncoder, tokenize
from diffusion_jax.models.text.t5 import T5Encoder
from diffusion_jax.paths import Path

WEIGHTS = "model"
MODEL_TYPES = {"T5EncoderModel": "t5", "UMT5EncoderModel": "umt5", "BertModel": "bert"}
Encoder = ClipTextEncoder | T5Encoder | BertEncoder
MODULES = {
    "CLIPTextModel": ClipTextEncoder,
    "CLIPTextModelWithProjection": ClipTextEncoder,
    "CLIPModel": ClipTextEncoder,
    "T5EncoderModel": T5Encoder,
    "MT5EncoderModel": T5Encoder,
    "UMT5EncoderModel": T5Encoder,
    "BertModel": BertEncoder,
}
# Default values in transformers of fields missing in config.json, where our defaults differ.
MT5 = dict(vocab_size=250112, d_model=512, d_ff=1024, num_layers=8, num_heads=6)
DEFAULTS = {
    "CLIPTextModel": {},
    "CLIPTextModelWithProjection": dict(projection_dim=512),
    "CLIPModel": dict(projection_dim=512),
    "T5EncoderModel": dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
    "MT5EncoderModel": MT5,
    "UMT5EncoderModel": MT5 | dict(own_biases=True),
    "BertModel": {},
}
WHOLE = {  # models with an encoder as in another class, and with more that is left out
    **dict.fromkeys(("T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel"), "T5EncoderModel"),
    **dict.fromkeys(("MT5Model", "MT5ForConditionalGeneration"), "MT5EncoderModel"),
    **dict.fromkeys(("UMT5Model", "UMT5ForConditionalGeneration"), "UMT5EncoderModel"),
    **dict.fromkeys(("BertForMaskedLM", "BertForPreTraining"), "BertModel"),
}
TOKENIZERS = {ClipTextEncoder: models.BPE, T5Encoder: models.Unigram, BertEncoder: models.Model}  # BERT has had all
RUNTIME_FIELDS = {"parent", "name", "dtype", "own_biases", "final_norm"}  # of no config.json
NAMED_LAYERS = {"last": 0, "penultimate": 1}  # layers after it
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")  # of CLIP


def load_text_encoder(
    folder: str | Path, dtype: DTypeLike = jnp.float32, allow_pickle: bool = False
) -> tuple[Encoder, PyTree]:
    """The text encoder of a folder and its variables. Run it by `encoder.apply(variables, ids)`, T5 with a mask too.

    folder: of a text encoder, or of a whole model with one.
    dtype: of the variables.
    allow_pickle: see `read_tensors`.
    For another compute type, `encoder.clone(dtype=jnp.bfloat16)` uses the same variables.
    Raises FileNotFoundError for a missing file and ValueError for an unsupported config or weights that do not fit.
    """
    encoder, like = text_encoder_of(*read_config(folder))
    tensors, source = read_tensors(folder, WEIGHTS, allow_pickle)
    return encoder, from_torch(canonical(tensors, encoder), source, like, dtype)


def text_encoder_of(config: Mapping, source: str | Path) -> tuple[Encoder, PyTree]:
    """The encoder that a config.json describes, and the shapes of its variables. Arguments as in `folders.unet_of`."""
    (name, *_) = np.ravel(config.get("architectures") or None).tolist()
    name = WHOLE.get(name, name)
    if name not in MODULES:
        known = ", ".join([*MODULES, *WHOLE])
        raise ValueError(f"{source}: expected the architecture of a text encoder, {known}; got {name}")
    if config.get("use_attention_mask"):
        raise ValueError(f"{source}: use_attention_mask=true, which hides the padding, is not supported")
    known_fields = {field.name for field in dataclasses.fields(MODULES[name])} - RUNTIME_FIELDS
    if name == "CLIPTextModel":
        known_fields.remove("projection_dim")  # of the full CLIP model
    if name == "CLIPModel":
        projection = {field: config[field] for field in ("projection_dim",) if field in config}
        config = config.get("text_config", {}) | projection
    fields = DEFAULTS[name] | {field: config[field] for field in known_fields & config.keys()}
    return module_and_shapes(MODULES[name], fields, source, lambda encoder: encoder.example_inputs())


def canonical(tensors: Mapping[str, np.ndarray], encoder: Encoder) -> dict[str, np.ndarray]:
    """A text encoder's tensors with one set of names. Different versions of transformers use different names.

    What whole models have besides is left out: decoders, heads, the encoder of images.
    Layers beyond those of config.json are left out, as in transformers: some folders skip the last ones so.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    if isinstance(encoder, T5Encoder):
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
        return {name.replace("encoder.embed_tokens.", "shared."): tensor for name, tensor in own.items()}
    if isinstance(encoder, BertEncoder):
        plain = {_of_bert(name): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in plain.items() if not name.startswith(("pooler.", "cls."))}
    other_prefixes = ("vision_model.", "visual_projection.", "logit_scale")
    named = {qualified(name): tensor for name, tensor in tensors.items() if not name.startswith(other_prefixes)}
    count = encoder.num_hidden_layers
    unused = {name for name in named if (layer := LAYER.match(name)) and 0 < count <= int(layer[1])}
    if unused:
        logging.warning(
            "the weights of a text encoder have more layers than the %d of its config.json, which are used", count
        )
    return {name: tensor for name, tensor in named.items() if name not in unused}


def _of_bert(name: str) -> str:
    """A name in BERT. The first weights, converted from TensorFlow, have other names for those of norms."""
    return re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert.")))


def qualified(path: str) -> str:
    """The path of a part of CLIP's text encoder with the prefix that newer versions of transformers leave out."""
    return path if path.startswith("text_") else f"text_model.{path}"


def save_text_encoder(encoder: Encoder, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32) -> None:
    """Write a folder that `load_text_encoder` and diffusers read. dtype: of the stored tensors."""
    name = class_name(encoder)
    head = {"architectures": [name], "model_type": MODEL_TYPES.get(name, "clip_text_model")}
    names = sorted({field.name for field in dataclasses.fields(encoder)} - RUNTIME_FIELDS)
    fields = {name: getattr(encoder, name) for name in names if getattr(encoder, name) is not None}
    folder = paths.at(folder)
    write_json(folder / "config.json", head | fields)
    write_file(folder / f"{WEIGHTS}.safetensors", to_torch(variables), dtype)


def without_last_layers(encoder: ClipTextEncoder, variables: PyTree, count: int) -> tuple[ClipTextEncoder, PyTree]:
    """The encoder whose final norm follows an earlier layer.

    count: layers to leave out at the end, `clip_skip` of diffusers.
    Raises ValueError unless a layer is left.
    """
    left = encoder.num_hidden_layers - count
    if count < 0 or left < 1:
        raise ValueError(f"clip_skip: expected 0 to {encoder.num_hidden_layers - 1}, got {count}")
    dropped = {f"layers_{i}" for i in range(left, encoder.num_hidden_layers)}
    text_model = variables["params"]["text_model"]
    layers = {name: layer for name, layer in text_model["encoder"].items() if name not in dropped}
    params = {**variables["params"], "text_model": {**text_model, "encoder": layers}}
    return encoder.clone(num_hidden_layers=left), {**variables, "params": params}


def class_name(encoder: Encoder) -> str:
    """The name of the encoder's class in transformers."""
    if isinstance(encoder, T5Encoder):
        return "UMT5EncoderModel" if encoder.own_biases else "T5EncoderModel"
    if isinstance(encoder, BertEncoder):
        return "BertModel"
    return "CLIPTextModel" if encoder.projection_dim is None else "CLIPTextModelWithProjection"


def text_encoder(
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    length: int | None = None,
    layer: str | int = "last",
    norm: bool | None = None,
    dtype: DTypeLike = jnp.float32,
    allow_pickle: bool = False,
) -> TextEncoder:
    """A published encoder and its tokenizer as a `models.text.encoder.TextEncoder`, e.g. from pipeline/text_encoder and
    pipeline/tokenizer.

    Denoisers attend to the padding of CLIP like to any token, so its mask is True everywhere. That of T5 and BERT is
    not. The vector of CLIP is that of its end token, after its projection if it has one; of the others it is
    `mean_of_tokens`.

    tokenizer_folder: by default the encoder's folder, or one beside it: tokenizer_2 of text_encoder_2.
    length: tokens of a prompt, as in `load_tokenizer`.
    layer: whose tokens: "last", "penultimate", or a number of layers after it.
    norm: whether the final norm follows that layer; by default it follows the last one. BERT has none.
    dtype: of the weights and of the large multiplications.
    allow_pickle: see `read_tensors`.
    Raises ValueError for another layer, a length beyond the encoder's positions or the tokenizer of another encoder,
    and the errors of both loaders.
    """
    module, params = load_text_encoder(folder, dtype, allow_pickle)
    module = module.clone(dtype=dtype)
    skipped = _skipped(layer, module, folder)
    tokenizer_folder = tokenizer_folder or tokenizer_beside(folder)
    tokenizer = load_tokenizer(tokenizer_folder, length)
    _check_tokenizer(tokenizer, module, f"{tokenizer_folder}: not the tokenizer of {folder}")
    length = tokenizer.padding["length"]
    if isinstance(module, BertEncoder) and norm is not None:
        raise ValueError(f"{folder}: norm is for encoders with a final norm, and BERT has none: leave it out")
    has_norm = skipped == 0 if norm is None else norm
    apply, tokenize_prompts = embedding(module, skipped, has_norm), tokenize
    if isinstance(module, ClipTextEncoder):
        tokenize_prompts = _tokenize_with_full_mask
    ids = jnp.zeros((1, length), jnp.int32)
    tokens = jax.eval_shape(apply, params, ids, ids == 0).tokens
    return TextEncoder(
        tokenize=functools.partial(tokenize_prompts, tokenizer=tokenizer, length=length),
        apply=apply,
        params=params,
        length=length,
        width=tokens.shape[-1],
    )


def _check_tokenizer(tokenizer: Tokenizer, module: Encoder, wrong: str) -> None:
    """Raise ValueError for the tokenizer of another encoder. wrong: the beginning of the message."""
    kind = TOKENIZERS[type(module)]
    if not isinstance(tokenizer.model, kind):
        raise ValueError(f"{wrong}: expected one of {kind.__name__}, got {type(tokenizer.model).__name__}")
    tokens = 1 + max(tokenizer.get_vocab().values())
    if not module.vocab_size / 2 <= tokens <= module.vocab_size:
        raise ValueError(f"{wrong}: it has {tokens} tokens, and the encoder has embeddings of {module.vocab_size}")
    if isinstance(module, ClipTextEncoder) and module.eos_token_id != OLD_EOS:
        end = tokenizer.encode("").ids[tokenizer.num_special_tokens_to_add(is_pair=False) - 1]
        if end != module.eos_token_id:
            raise ValueError(f"{wrong}: it ends a text with token {end}, expected eos_token_id, {module.eos_token_id}")


def tokenizer_beside(folder: str | Path) -> Path:
    """The folder of the tokenizer of a text encoder's folder. Raises FileNotFoundError if there is none."""
    folder = paths.at(folder)
    named = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, named):
        if any((place / name).exists() for name in FILES):
            return place
    raise FileNotFoundError(f"{folder}: expected its tokenizer there or in {named}")


def _skipped(layer: str | int, module: Encoder, folder: str | Path) -> int:
    """How many layers come after the one whose tokens are used."""
    count = NAMED_LAYERS.get(layer, layer)
    layers = module.num_layers if isinstance(module, T5Encoder) else module.num_hidden_layers
    if not isinstance(count, int) or not 0 <= count < layers:
        known = f"last, penultimate or a number from 0 to {layers - 1}"
        raise ValueError(f"{folder}: layer: expected {known}, got {layer!r}")
    return count


def _tokenize_with_full_mask(prompts, tokenizer, length, warn=True):
    ids, mask = tokenize(prompts, tokenizer, length, warn)
    return ids, np.ones_like(mask)


def files_of(folder: str | Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The local files that `text_encoder` reads: those of the encoder, and those of its tokenizer.

    Raises FileNotFoundError if one is missing.
    """
    weights, words = find_tensors(folder, WEIGHTS), paths.fetched(tokenizer_beside(folder))
    parts = sorted(set(shards(weights).values())) if weights.suffix == ".json" else []
    tokenizer = [words / name for name in ALL_FILES if (words / name).is_file()]
    return [read_config(folder)[1], weights, *parts], tokenizer
