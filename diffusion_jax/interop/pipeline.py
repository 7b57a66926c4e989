"""Whole text-to-image models as they are published: a folder of diffusers, or one file of the original code.

A folder has model_index.json and a subfolder for each part. The card of its family (`families`) says which they are,
for example:

    unet/ vae/ text_encoder/ text_encoder_2/      networks, each a config.json and its tensors
    tokenizer/ tokenizer_2/                       vocabularies
    scheduler/                                    scheduler_config.json: the noise schedule and what is predicted
    safety_checker/                               finds images that must not be shown
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tokenizers import Tokenizer

from diffusion_jax import paths
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.interop import families
from diffusion_jax.interop.copied import write_changed
from diffusion_jax.interop.encoders import without_last_layers
from diffusion_jax.interop.family import Description, Family, Network
from diffusion_jax.interop.names import from_torch
from diffusion_jax.interop.noise_schedules import PREDICTIONS, schedule_of, scheduler_config
from diffusion_jax.interop.safety import SafetyChecker
from diffusion_jax.interop.schedulers import FLOWS
from diffusion_jax.interop.single_file import read_checkpoint, read_denoiser
from diffusion_jax.interop.tensors import read_json, read_tensors, write_json
from diffusion_jax.interop.tokenizers import load_tokenizer, save_tokenizer, tokenizer_class
from diffusion_jax.models.applied import shapes_of
from diffusion_jax.paths import Path

NO_NETWORKS = ("scheduler", "feature_extractor", "safety_checker")  # further entries of model_index.json
LEVELS = 2  # of folders in a pipeline: itself, and those of its parts


class Part(NamedTuple):
    """A network and its variables: `part.module.apply(part.params, …)`."""

    module: Any
    params: PyTree


class PublishedPipeline(NamedTuple):
    """A published text-to-image model.

    family: its card.
    parts: folder of each network -> the network, as the card names them.
    tokenizers: one for each text encoder; of a single file none.
    schedule, prediction: of the denoiser; "eps", "v" or "x0", and for a flow schedule "flow".
    scheduler: scheduler_config.json, where timestep_spacing, steps_offset and the like say how its authors sample.
    index: model_index.json without the parts, such as force_zeros_for_empty_prompt.
    safety_checker: None if it has none, or is not to be used. `save_pipeline` does not write it.
    """

    family: Family
    parts: Mapping[str, Part]
    tokenizers: tuple[Tokenizer, ...]
    schedule: Schedule
    prediction: str
    scheduler: Mapping = MappingProxyType({})
    index: Mapping = MappingProxyType({})
    safety_checker: SafetyChecker | None = None

    @property
    def denoiser(self) -> Part:
        """The network that denoises latents."""
        return self.parts[self.family.denoiser]

    @property
    def autoencoder(self) -> Part:
        """The network from images to latents and back."""
        return self.parts[self.family.autoencoder]

    @property
    def text_encoders(self) -> tuple[Part, ...]:
        """The text encoders, in the order of their tokenizers; a single file may lack them."""
        return tuple(self.parts[name] for name in self.family.tokenizers if name in self.parts)

    def with_denoiser(self, denoiser: Part) -> "PublishedPipeline":
        """The pipeline with another denoiser."""
        return self._replace(parts={**self.parts, self.family.denoiser: denoiser})

    def with_clip_skip(self, layers: int) -> "PublishedPipeline":
        """The pipeline without the last layers of its text encoder. Add LoRAs first, which may update them.

        layers: `clip_skip` of diffusers, 0 for none; web interfaces count from 1 instead.
        Raises ValueError for too many layers, and for a family whose denoiser needs all.
        """
        if not layers:
            return self
        if not (self.family.prompt and self.family.prompt.can_skip_layers):
            raise ValueError(f"clip_skip: {self.family.name} has no choice of the text encoders' layer, set it to 0")
        encoders = {name: self.parts[name] for name in self.family.tokenizers if name in self.parts}
        cut = {name: Part(*without_last_layers(*part, layers)) for name, part in encoders.items()}
        return self._replace(parts={**self.parts, **cut})


def load_pipeline(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    prediction: str | None = None,
    tokenizers: str | Path | None = None,
    allow_pickle: bool = False,
    safety_checker: bool = True,
    scan: bool = False,
    parts: Mapping[str, str | Path] = MappingProxyType({}),
    stored: bool = False,
) -> PublishedPipeline:
    """A pipeline from a diffusers folder or from a .safetensors file in the original layout.

    dtype: of all variables.
    prediction: override it with "eps", "v" or "x0". Needed for a single file that does not say it; "flow" for SiT.
    tokenizers: the folder of a pipeline with the tokenizers for a single file.
    allow_pickle: see `read_file`.
    safety_checker: load that of a folder whose model_index.json names one.
    scan: compile one block of the denoiser for all, see `models.transformer.Transformer`.
    parts: places of networks that the checkpoint has not. "vae": the folder of the autoencoder, for a single file
      without one. "denoiser": a file with the denoiser alone, which is read instead of that of a folder.
    stored: leave the weights in their files until they are used (`diffusion_jax.stored`).
    Raises FileNotFoundError for missing files and ValueError for unsupported or malformed ones, naming the file.
    """
    path = paths.fetched(path, LEVELS)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder: name a folder that diffusers saved, or a .safetensors file; a name on a "
            "hub is not looked up"
        )
    if prediction not in (None, *PREDICTIONS.values(), "flow"):
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS.values())} or flow, got {prediction!r}")
    family, networks, scheduler, index = _read(path, allow_pickle, prediction, parts)
    if family.autoencoder not in networks:
        raise ValueError(f"{path} has no autoencoder: name the folder of one as `vae`")
    if scan:
        networks[family.denoiser] = _scanned(networks[family.denoiser], family)
    if path.is_file() and family.single_file.ask and not (prediction or "prediction_type" in scheduler):
        raise ValueError(f"{path}: {family.name} in one file does not say what it predicts; {family.single_file.ask}")
    source = path / "scheduler" / "scheduler_config.json"
    schedule, stated = schedule_of(scheduler, source)
    if family.is_flow and stated != "flow":
        known = " or ".join(FLOWS)
        raise ValueError(f"{source}: {family.name} needs {known}, got {scheduler.get('_class_name')}")
    prediction = _prediction(path, schedule, stated, prediction)
    folders = [paths.at(tokenizers or path) / folder for name, folder in family.tokenizers.items() if name in networks]
    return PublishedPipeline(
        family=family,
        parts={
            name: Part(network.module, from_torch(network.tensors, network.source, network.like, dtype, stored))
            for name, network in networks.items()
        },
        tokenizers=tuple(load_tokenizer(folder) for folder in folders if tokenizers or folder.is_dir()),
        schedule=schedule,
        prediction=prediction,
        scheduler=scheduler,
        index=index,
        safety_checker=_safety_checker(path, family, allow_pickle) if safety_checker else None,
    )


def _prediction(path: Path, schedule: Schedule, stated: str, asked: str | None) -> str:
    """What the network predicts: `asked`, or what scheduler_config.json states. Raises ValueError where it cannot."""
    if stated == "flow":
        if asked not in (None, "flow"):
            raise ValueError(f"{path}: its network predicts flow, by its scheduler: leave out prediction={asked!r}")
        return stated
    if asked == "flow":
        raise ValueError(f"{path}: its noise schedule is not that of a flow: leave out prediction='flow'")
    if (asked or stated) == "eps" and schedule(schedule.t_max).alpha == 0:
        raise ValueError(
            f"{path}: its noise schedule begins at pure noise (zero terminal SNR), where eps does not determine the "
            "image; if its network predicts v or x0, set prediction to that"
        )
    return asked or stated


def described(name: str, dtype: DTypeLike = jnp.float32) -> PublishedPipeline | None:
    """The published checkpoint of a short name, such as "sd15", with the shapes of its variables instead of weights,
    and without tokenizers. None for another name.

    dtype: of all variables.
    """

    for family in families.FAMILIES:
        if name in family.sizes:
            configs = dict(family.sizes[name])
            schedule, prediction = schedule_of(configs["scheduler"], name)
            parts = {part: component.build(configs[part], name) for part, component in family.parts.items()}
            return PublishedPipeline(
                family=family,
                parts={
                    part: Part(module, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes))
                    for part, (module, shapes) in parts.items()
                },
                tokenizers=(),
                schedule=schedule,
                prediction=prediction,
                scheduler=configs["scheduler"],
            )
    return None


def _scanned(network: Network, family: Family) -> Network:
    """The network with its equal blocks compiled once. Raises ValueError for one that has none."""
    if not hasattr(network.module, "scan"):
        raise ValueError(f"scan: the blocks of {family.name} are not all equal, set it to False")
    module = network.module.clone(scan=True)
    return network._replace(module=module, like=shapes_of(module))


def _safety_checker(path: Path, family: Family, allow_pickle: bool) -> SafetyChecker | None:
    if path.is_file() or not family.safety_checker:
        return None
    if not _is_used(read_json(path / "model_index.json").get("safety_checker")):
        return None
    try:
        return family.safety_checker(path / "safety_checker", allow_pickle)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; without it, set safety_checker=False") from None


def save_pipeline(
    pipeline: PublishedPipeline,
    folder: str | Path,
    dtype: DTypeLike = jnp.float32,
    source: str | Path | None = None,
) -> None:
    """Write a folder that `load_pipeline` and diffusers read.

    dtype: of the stored tensors.
    source: the folder that the pipeline was loaded from. Text encoders that are loaded in part (`Component.save`) are
      copied from it with their tokenizers. Tensors that were changed since, such as by a LoRA, are written anew.
    Raises ValueError for such a text encoder without a source.
    """
    folder, family = paths.at(folder), pipeline.family
    copied = [name for name in pipeline.parts if family.parts[name].save is None]
    if copied and source is None:
        raise ValueError(
            f"{folder}: {family.name} loads only a part of its {', '.join(copied)}: give the folder that it was loaded "
            "from as `source`, to copy the whole from it"
        )
    fixed = family.index(pipeline.denoiser.module)
    index = {"_class_name": fixed["_class_name"], **pipeline.index} | {
        name: value for name, value in fixed.items() if name != "_class_name"
    }
    if copied:
        source = paths.fetched(source, LEVELS)
        entries = read_json(source / "model_index.json")
        for name in (*copied, *(family.tokenizers[name] for name in copied)):
            paths.copy_into(folder / name, source / name)
            index[name] = entries[name]
        for name in copied:
            write_changed(family.parts[name], *pipeline.parts[name], folder / name, source / name)
    for name, part in pipeline.parts.items():
        component = family.parts[name]
        if name not in index:
            component.save(*part, folder / name, dtype)
            index[name] = [component.library, component.class_name(part.module)]
    folders = [tokenizer for encoder, tokenizer in family.tokenizers.items() if encoder in pipeline.parts]
    for name, tokenizer in zip(folders, pipeline.tokenizers, strict=bool(pipeline.tokenizers)):
        if name not in index:
            save_tokenizer(tokenizer, folder / name)
            index[name] = ["transformers", tokenizer_class(tokenizer)]
    scheduler = scheduler_config(pipeline.scheduler, pipeline.schedule, pipeline.prediction)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def family_of(path: str | Path, allow_pickle: bool = False) -> Family:
    """The family of a folder or file. Raises the errors of `load_pipeline`."""
    path = paths.fetched(path, LEVELS)
    return read_checkpoint(path, allow_pickle).family if path.is_file() else _family_and_configs(path)[0]


def read_networks(path: str | Path, allow_pickle: bool = False) -> tuple[Family, dict[str, Network]]:
    """The family of a folder or file, and its networks by part; text encoders may be missing."""
    return _read(paths.fetched(path, LEVELS), allow_pickle)[:2]


def _read(
    path: Path, allow_pickle: bool, prediction: str | None = None, others: Mapping = MappingProxyType({})
) -> tuple[Family, dict[str, Network], Mapping, dict]:
    """The family and the networks of a folder or file, scheduler_config.json, and model_index.json without the parts,
    which a file lacks. Arguments as of `load_pipeline`, others: its `parts`.
    """
    if unknown := others.keys() - {"vae", "denoiser"}:
        raise ValueError(f"parts: expected vae or denoiser, got {', '.join(sorted(unknown))}")
    if path.is_file():
        if "denoiser" in others:
            raise ValueError(f"denoiser={str(others['denoiser'])!r} replaces that of a folder, and {path} is a file")
        family, parts, scheduler, sources = read_checkpoint(path, allow_pickle, prediction, others.get("vae"))
        index = {}
    else:
        if "vae" in others:
            raise ValueError(f"vae={str(others['vae'])!r} is for a file without an autoencoder, and {path} is a folder")
        family, configs = _family_and_configs(path)
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        entries = read_json(path / "model_index.json")
        index = {name: value for name, value in entries.items() if not isinstance(value, list)}
        parts, sources = {}, {}
        for name, config in configs.items():
            if "denoiser" in others and name == family.denoiser:
                sources[name] = str(others["denoiser"])
                parts[name] = read_denoiser(sources[name], family, config, path / name / "config.json", allow_pickle)
            else:
                tensors, sources[name] = read_tensors(path / name, family.parts[name].weights, allow_pickle)
                parts[name] = Description(config, tensors)
    networks = {}
    for name, (config, tensors) in parts.items():
        component = family.parts[name]
        module, like = component.build(config, sources[name] if path.is_file() else path / name / "config.json")
        networks[name] = Network(module, like, component.tensors(tensors, module), sources[name])
    return family, networks, scheduler, index


def _family_and_configs(path: Path) -> tuple[Family, dict[str, dict]]:
    """The family of a folder, and the config.json of each of its parts."""
    index = read_json(path / "model_index.json")
    used = [name for name, entry in index.items() if _is_used(entry)]
    configs = {name: read_json(file) for name in used if (file := path / name / "config.json").is_file()}
    family = next((family for family in families.FAMILIES if family.recognises(index, configs)), None)
    if family is None:
        names = ", ".join(family.name for family in families.FAMILIES)
        raise ValueError(
            f"{path / 'model_index.json'}: expected a pipeline of one of {names}; got {index.get('_class_name')} with "
            f"{', '.join(used) or 'no parts'}"
        )
    for name in family.parts:
        if name not in used and name not in family.tokenizers:
            expected = ", ".join(family.parts)
            raise ValueError(f"{path / 'model_index.json'}: {family.name} has the parts {expected}, got no {name}")
        if name in used and name not in configs:
            raise FileNotFoundError(f"{path / name / 'config.json'}: no such file")
    others = [name for name in used if name not in {*family.parts, *family.tokenizers.values(), *NO_NETWORKS}]
    if others:
        logging.warning("%s: %s, which is not supported and not used", path / "model_index.json", ", ".join(others))
    return family, {name: configs[name] for name in family.parts if name in configs}


def _is_used(entry):
    """Whether model_index.json's entry of a part, [library, class], names anything."""
    return isinstance(entry, list) and entry[:1] not in ([], [None])
