"""What there is to know about a family of published models, as values: see `Family`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from diffusion_jax.data.references import References
from diffusion_jax.interop.originals import WHOLE, Places
from diffusion_jax.interop.prompts import chunked_for_each, in_one_chunk
from diffusion_jax.interop.quantized import Tensor

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]  # content of a JSON file


class Description(NamedTuple):
    """A part of a pipeline as in a folder: the content of its config.json, and its tensors."""

    config: Config
    tensors: Tensors


class Network(NamedTuple):
    """A network of a pipeline before loading: the shapes of its variables, and the tensors to load."""

    module: Any
    like: PyTree
    tensors: Tensors
    source: str


class Component(NamedTuple):
    """A kind of network: how the folder of a part becomes a module, and back.

    library: "diffusers" or "transformers", the library that has this network.
    class_name: module -> the name of its class in that library.
    weights: name of the file of weights, without its ending.
    build: (config.json, its path) -> (module, shapes of its variables). Raises ValueError for an unsupported config.
    tensors: (tensors, module) -> the tensors under the names of the module's own variables (`names.torch_name`).
    save: (module, variables, folder, dtype), writes config.json and weights. None for a text encoder that is loaded in
      part, without the layers that nothing reads.
    depth: how deep inside the network `verify` compares submodules.
    inputs: module -> random inputs of it by name, for `verify`. "x", "t", "ids" and "mask" are arguments of its
      `apply`, the others its condition.
    run: (torch module, the same inputs as tensors, channels first) -> None. Calls the module.
    qualified: path of a submodule in that library -> its path in ours.
    """

    library: str
    class_name: Callable[[Any], str]
    weights: str
    build: Callable[[Config, str | Path], tuple[Any, PyTree]]
    tensors: Callable[[Tensors, Any], Tensors]
    save: Callable[..., None] | None
    depth: int
    inputs: Callable[[Any], dict[str, Array]]
    run: Callable[[Any, Mapping[str, Any]], Any]
    qualified: Callable[[str], str] = lambda path: path


class Prompt(NamedTuple):
    """How prompts become the condition of the denoiser.

    embed: (module of a text encoder, variables, ids (B * chunks, L), weights (B, chunks, L)) -> its output, and the
      text (B, chunks * L, D). The texts of several encoders are concatenated on D.
    tokens: (prompts, tokenizers) -> for each text encoder ids and weights, each (B, chunks, L).
    length: tokens of a prompt; 0 for as many as each text encoder has positions.
    captions: likewise of captions of records, one chunk each.
    added: (outputs of the text encoders for the first chunk, (height, width)) -> further leaves (B, ...) of the
      condition.
    sizes: the leaf of `added` that tells the network original size, corner of the crop and size of the image, "" if it
      is not told.
    can_skip_layers: whether the last layers of the text encoders can be left out, a choice of users (clip skip).
    null_is_zeros: model_index.json -> whether "no condition" is zeros instead of the empty prompt.
    """

    embed: Callable[..., tuple[Any, Array]]
    tokens: Callable[..., Sequence[tuple[np.ndarray, np.ndarray]]] = chunked_for_each
    length: int = 0
    captions: Callable[..., Sequence[tuple[np.ndarray, np.ndarray]]] = in_one_chunk
    added: Callable[[Sequence[Any], tuple[int, int]], dict[str, Array]] = lambda outputs, size: {}
    sizes: str = ""
    can_skip_layers: bool = False
    null_is_zeros: Callable[[Config], bool] = lambda index: False


class SingleFile(NamedTuple):
    """A checkpoint in one file.

    read: tensors -> the parts, or None for a file of another family. Raises KeyError, IndexError or ValueError for a
      file of the family with missing or misshapen tensors.
    scheduler: scheduler_config.json of the family.
    states: (tensors, header) -> those of its fields that the file states otherwise, in marker tensors and in the
      metadata of its header. Raises ValueError for a statement that is not supported.
    ask: advice in the error for a file that does not say what its network predicts; "" if `scheduler` says it.
    """

    read: Callable[[Tensors], dict[str, Description] | None]
    scheduler: Config
    states: Callable[[Tensors, Mapping[str, str]], Config] = lambda tensors, header: {}
    ask: str = ""


class FileNames(NamedTuple):
    """Names of maps in files of LoRA, and in files of a denoiser alone.

    prefixes: beginning of the names that join the path with underscores -> the part.
    dotted: beginning of the names with dots, apart from the names of the parts themselves -> the part.
    places: (part, path with underscores or dots, module of the denoiser) -> the maps in the layout of the folder.
      Raises ValueError for a map of another model.
    """

    prefixes: Mapping[str, str] = MappingProxyType({})
    dotted: Mapping[str, str] = MappingProxyType({})
    places: Callable[[str, str, Any], Places] = lambda part, path, denoiser: {path: WHOLE}


def transformer_names(places: Callable[[str], Places]) -> FileNames:
    """The names of ComfyUI and kohya for a denoiser in the folder transformer/.

    places: path -> the maps in the layout of the folder. Raises ValueError for a map of another model.
    """
    prefixes = ("lora_unet", "lora_transformer", "lycoris")
    return FileNames(
        prefixes=dict.fromkeys(prefixes, "transformer"),
        dotted=dict.fromkeys(("diffusion_model", "model.diffusion_model", *prefixes), "transformer"),
        places=lambda part, path, transformer: places(path),
    )


class Family(NamedTuple):
    """A card: everything that the code for published models needs to know about a family.

    name, licence, source: for people. source: paper or repository.
    recognises: (model_index.json, {part: config.json}) -> whether a folder is of this family.
    parts: folder of each network -> its kind. Text encoders may be missing until prompts are read.
    denoiser, autoencoder: the names of these parts.
    tokenizers: folder of each text encoder -> folder of its tokenizer, in the order of the denoiser's condition.
    prompt: None for models of classes, and for those that need more than a prompt, which can be loaded and saved, not
      sampled.
    classes: module of the denoiser -> number of classes that prompts name; 0 for a family of texts. The class after
      the last is none. Names of classes are in `id2label` of model_index.json.
    index: module of the denoiser -> model_index.json without the parts.
    fits: (denoiser, autoencoder) -> what is wrong with them together, "" if nothing.
    scheduler_changes: fields of scheduler_config.json that diffusers overrides when it loads such a pipeline.
    is_flow: whether its scheduler must be that of a rectified flow.
    levels: (cells of an image that the denoiser sees, steps) -> what a pipeline of flow gives to its scheduler, see
      `schedulers.published_plan`.
    references: which reference pictures it reads beside the prompt.
    has_guidance: (model_index.json, scheduler_config.json) -> whether guidance is built in, because the model was
      distilled with it.
    safety_checker: (folder, allow_pickle) -> its safety checker; None if it has none.
    single_file: None if there is no such layout.
    names: those in files of low-rank updates, and of the denoiser alone.
    sizes_of: (tensors of a denoiser, config.json of the one that it replaces) -> the fields of config.json that the
      tensors determine. Raises ValueError for one that does not fit the other parts, and KeyError without a tensor.
    embeddings: names of tensors in files of learned words -> the text encoder that reads them.
    sizes: short name of a published checkpoint -> {part: its config.json} and its "scheduler".
    """

    name: str
    licence: str
    source: str
    recognises: Callable[[Config, Mapping[str, Config]], bool]
    parts: Mapping[str, Component]
    denoiser: str
    autoencoder: str
    tokenizers: Mapping[str, str]
    prompt: Prompt | None
    index: Callable[[Any], dict]
    classes: Callable[[Any], int] = lambda denoiser: 0
    fits: Callable[[Any, Any], str] = lambda denoiser, autoencoder: ""
    scheduler_changes: Config = MappingProxyType({})
    is_flow: bool = False
    levels: Callable[[int, int], Config] = lambda cells, steps: {}
    references: References = References()
    has_guidance: Callable[[Config, Config], bool] = lambda index, scheduler: False
    safety_checker: Callable[[Path, bool], Any] | None = None
    single_file: SingleFile | None = None
    names: FileNames = FileNames()
    sizes_of: Callable[[Tensors, Config], Config] = lambda tensors, config: {}
    embeddings: Mapping[str, str] = MappingProxyType({})
    sizes: Mapping[str, Mapping[str, Config]] = MappingProxyType({})
