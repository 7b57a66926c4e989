"""Text encoders in the folder format of transformers: `config.json` beside `model.safetensors`."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tokenizers import Tokenizer, models

from diffusion_jax import paths
from diffusion_jax.interop.folders import module_and_shapes, read_config
from diffusion_jax.interop.names import from_torch, to_torch, torch_names
from diffusion_jax.interop.tensors import find_tensors, read_tensors, shards, write_file, write_json
from diffusion_jax.interop.tokenizers import ALL_FILES, FILES, load_tokenizer
from diffusion_jax.models.applied import shapes_of
from diffusion_jax.models.text.bert import BertEncoder
from diffusion_jax.models.text.clip import OLD_EOS, ClipTextEncoder
from diffusion_jax.models.text.embedding import Encoder, embedding
from diffusion_jax.models.text.encoder import TextEncoder, tokenize
from diffusion_jax.models.text.qwen3 import Qwen3Encoder
from diffusion_jax.models.text.t5 import T5Encoder
from diffusion_jax.paths import Path

WEIGHTS = "model"
Tensors = Mapping[str, np.ndarray]
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")  # of CLIP
NAMED_LAYERS = {"last": 0, "penultimate": 1}  # layers after it
RUNTIME_FIELDS = {"parent", "name", "dtype", "own_biases", "final_norm", "outputs"}  # of no config.json


def _of_clip(tensors: Tensors, encoder: ClipTextEncoder) -> dict[str, np.ndarray]:
    """Layers beyond those of config.json are left out, as in transformers: some folders skip the last ones so."""
    other_prefixes = ("vision_model.", "visual_projection.", "logit_scale")
    named = {qualified(name): tensor for name, tensor in tensors.items() if not name.startswith(other_prefixes)}
    count = encoder.num_hidden_layers
    unused = {name for name in named if (layer := LAYER.match(name)) and 0 < count <= int(layer[1])}
    if unused:
        logging.warning(
            "the weights of a text encoder have more layers than the %d of its config.json, which are used", count
        )
    return {name: tensor for name, tensor in named.items() if name not in unused}


def qualified(path: str) -> str:
    """The path of a part of CLIP's text encoder with the prefix that newer versions of transformers leave out."""
    return path if path.startswith("text_") else f"text_model.{path}"


def _of_t5(tensors: Tensors, encoder: T5Encoder) -> dict[str, np.ndarray]:
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    return {name.replace("encoder.embed_tokens.", "shared."): tensor for name, tensor in own.items()}


def _of_bert(tensors: Tensors, encoder: BertEncoder) -> dict[str, np.ndarray]:
    """The first weights, converted from TensorFlow, have other names for those of norms."""
    plain = {
        re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert."))): tensor
        for name, tensor in tensors.items()
    }
    return {name: tensor for name, tensor in plain.items() if not name.startswith(("pooler.", "cls."))}


def _of_qwen3(tensors: Tensors, encoder: Qwen3Encoder) -> dict[str, np.ndarray]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}


class Kind(NamedTuple):
    """What transformers has for one of our modules.

    tokenizer: class of the tokenizer's model.
    tensors: (tensors, module) -> those of the module, by the module's own names.
    class_name: module -> the name of its class.
    layers: the field that counts the layers.
    has_final_norm: whether a norm may follow the last layer.
    """

    tokenizer: type
    tensors: Callable[[Tensors, Any], dict[str, np.ndarray]]
    class_name: Callable[[Any], str]
    layers: str = "num_hidden_layers"
    has_final_norm: bool = True


KINDS = {
    ClipTextEncoder: Kind(
        models.BPE, _of_clip, lambda e: f"CLIPTextModel{'WithProjection' * (e.projection_dim is not None)}"
    ),
    T5Encoder: Kind(models.Unigram, _of_t5, lambda e: f"{'UM' * e.own_biases}T5EncoderModel", "num_layers"),
    BertEncoder: Kind(models.Model, _of_bert, lambda e: "BertModel", has_final_norm=False),  # it has had all tokenizers
    Qwen3Encoder: Kind(models.BPE, _of_qwen3, lambda e: "Qwen3Model"),
}


class Published(NamedTuple):
    """A class of transformers.

    module: our class.
    model_type: in config.json.
    defaults: values in transformers of fields missing in config.json, where our defaults differ.
    fields: config.json -> the fields of the encoder in it. Raises ValueError for one that is not supported.
    """

    module: type
    model_type: str
    defaults: Mapping[str, Any] = MappingProxyType({})
    fields: Callable[[Mapping], Mapping] = lambda config: config


def _clip_text(config: Mapping) -> Mapping:
    """Without the projection of the whole model, which this class lacks."""
    return {name: value for name, value in config.items() if name != "projection_dim"}


def _clip_half(config: Mapping) -> Mapping:
    """The half of CLIP that reads texts."""
    return {**config.get("text_config", {}), **{f: config[f] for f in ("projection_dim",) if f in config}}


def _qwen3(config: Mapping) -> Mapping:
    """With rope_theta, which newer versions of transformers write into rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: expected an object, got {rope!r}")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"rope_type: expected 'default', got {kind!r}")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported")
    return {**{field: rope[field] for field in ("rope_theta",) if field in rope}, **config}


PROJECTED = dict(projection_dim=512)
T5 = dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu")
MT5 = dict(vocab_size=250112, d_model=512, d_ff=1024, num_layers=8, num_heads=6)
QWEN3 = dict(
    hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_key_value_heads=32, rope_theta=10000.0
)
CLASSES = {
    "CLIPTextModel": Published(ClipTextEncoder, "clip_text_model", fields=_clip_text),
    "CLIPTextModelWithProjection": Published(ClipTextEncoder, "clip_text_model", PROJECTED),
    "CLIPModel": Published(ClipTextEncoder, "clip", PROJECTED, _clip_half),
    "T5EncoderModel": Published(T5Encoder, "t5", T5),
    "MT5EncoderModel": Published(T5Encoder, "mt5", MT5),
    "UMT5EncoderModel": Published(T5Encoder, "umt5", MT5 | dict(own_biases=True)),
    "BertModel": Published(BertEncoder, "bert"),
    "Qwen3Model": Published(Qwen3Encoder, "qwen3", QWEN3, _qwen3),
}
WHOLE = {  # models with an encoder as in another class, and with more that is left out
    **dict.fromkeys(("T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel"), "T5EncoderModel"),
    **dict.fromkeys(("MT5Model", "MT5ForConditionalGeneration"), "MT5EncoderModel"),
    **dict.fromkeys(("UMT5Model", "UMT5ForConditionalGeneration"), "UMT5EncoderModel"),
    **dict.fromkeys(("BertForMaskedLM", "BertForPreTraining"), "BertModel"),
    "Qwen3ForCausalLM": "Qwen3Model",
}


def load_text_encoder(
    folder: str | Path, dtype: DTypeLike = jnp.float32, allow_pickle: bool = False, part: Encoder | None = None
) -> tuple[Encoder, PyTree]:
    """The text encoder of a folder and its variables. Run it by `encoder.apply(variables, ids)`, but for CLIP with a
    mask too.

    folder: of a text encoder, or of a whole model with one.
    dtype: of the variables.
    allow_pickle: see `read_tensors`.
    part: the encoder without some layers, which are then not read.
    For another compute type, `encoder.clone(dtype=jnp.bfloat16)` uses the same variables.
    Raises FileNotFoundError for a missing file and ValueError for an unsupported config or weights that do not fit.
    """
    encoder, like = text_encoder_of(*read_config(folder))
    tensors, source = read_tensors(folder, WEIGHTS, allow_pickle)
    tensors = canonical(tensors, encoder)
    if part is not None:
        encoder, whole, like = part, like, shapes_of(part)
        tensors = part_of(tensors, whole, like)
    return encoder, from_torch(tensors, source, like, dtype)


def text_encoder_of(config: Mapping, source: str | Path) -> tuple[Encoder, PyTree]:
    """The encoder that a config.json describes, and the shapes of its variables. Arguments as in `folders.unet_of`."""
    (name, *_) = np.ravel(config.get("architectures") or None).tolist()
    name = WHOLE.get(name, name)
    if name not in CLASSES:
        known = ", ".join([*CLASSES, *WHOLE])
        raise ValueError(f"{source}: expected the architecture of a text encoder, {known}; got {name}")
    if config.get("use_attention_mask"):
        raise ValueError(f"{source}: use_attention_mask=true, which hides the padding, is not supported")
    published = CLASSES[name]
    try:
        config = published.fields(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    known_fields = {field.name for field in dataclasses.fields(published.module)} - RUNTIME_FIELDS
    fields = {**published.defaults, **{field: config[field] for field in known_fields & config.keys()}}
    return module_and_shapes(published.module, fields, source)


def part_of(tensors: Tensors, whole: PyTree, part: PyTree) -> dict[str, np.ndarray]:
    """The tensors without those that only the whole encoder has. whole, part: variables or their shapes."""
    unused = torch_names(whole) - torch_names(part)
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def canonical(tensors: Tensors, encoder: Encoder) -> dict[str, np.ndarray]:
    """A text encoder's tensors with one set of names. Different versions of transformers use different names.

    What whole models have besides is left out: decoders, heads, the encoder of images.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    return KINDS[type(encoder)].tensors(tensors, encoder)


def save_text_encoder(encoder: Encoder, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32) -> None:
    """Write a folder that `load_text_encoder` and diffusers read. dtype: of the stored tensors."""
    name = class_name(encoder)
    head = {"architectures": [name], "model_type": CLASSES[name].model_type}
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
    return KINDS[type(encoder)].class_name(encoder)


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

    Denoisers attend to the padding of CLIP like to any token, so its mask is True everywhere. That of others is not.
    The vector of CLIP is that of its end token, after its projection if it has one; of the others it is
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
    module = text_encoder_of(*read_config(folder))[0].clone(dtype=dtype)
    skipped = _skipped(layer, module, folder)
    if norm is not None and not KINDS[type(module)].has_final_norm:
        raise ValueError(f"{folder}: norm is for encoders with a final norm, and BERT has none: leave it out")
    has_norm = skipped == 0 if norm is None else norm
    _, params = load_text_encoder(folder, dtype, allow_pickle, module.cut(skipped, has_norm))
    tokenizer_folder = tokenizer_folder or tokenizer_beside(folder)
    tokenizer = load_tokenizer(tokenizer_folder, length)
    _check_tokenizer(tokenizer, module, f"{tokenizer_folder}: not the tokenizer of {folder}")
    length = tokenizer.padding["length"]
    # compiled, so that a single prompt is traced only here
    apply, tokenize_prompts = jax.jit(embedding(module, skipped, has_norm)), tokenize
    if isinstance(module, ClipTextEncoder):
        tokenize_prompts = _tokenize_with_full_mask
    ids = np.zeros((1, length), np.int32)
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
    kind = KINDS[type(module)].tokenizer
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
    layers = getattr(module, KINDS[type(module)].layers)
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
