"""Whole pipelines in one file, such as those of the original code of Stable Diffusion."""

from typing import NamedTuple

from diffusion_jax import paths
from diffusion_jax.interop import families
from diffusion_jax.interop.family import Config, Description, Family
from diffusion_jax.interop.folders import WEIGHTS, read_config
from diffusion_jax.interop.tensors import read_file, read_metadata, read_tensors
from diffusion_jax.paths import Path


class Checkpoint(NamedTuple):
    """The content of a file: its family, those of the parts that it has, scheduler_config.json, and for each part the
    file of its tensors.
    """

    family: Family
    parts: dict[str, Description]
    scheduler: Config
    sources: dict[str, str]


def read_checkpoint(
    path: str | Path, allow_pickle: bool = False, prediction: str | None = None, vae: str | Path | None = None
) -> Checkpoint:
    """The content of a checkpoint in one file.

    prediction: "flow" for a family of flow, another one for the others, None for any.
    vae: the folder of an autoencoder, for a file that has none.
    Raises ValueError if no family knows the file, if it lacks tensors, or if a tensor or a field of its header is not
    supported, and the errors of `read_file`.
    """
    tensors = read_file(path, allow_pickle)
    header = read_metadata(path) if paths.at(path).suffix == ".safetensors" else {}
    readable = [
        family
        for family in families.FAMILIES
        if family.single_file and (prediction is None or family.is_flow == (prediction == "flow"))
    ]
    for family in readable:
        try:
            parts = family.single_file.read(tensors)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} lacks or misshapes tensors of {family.name}: {error}") from None
        if parts is None:
            continue
        try:
            stated = family.single_file.states(tensors, header)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        sources = dict.fromkeys(parts, str(path))
        if vae and family.autoencoder not in parts:
            tensors, sources[family.autoencoder] = read_tensors(vae, WEIGHTS, allow_pickle)
            parts = {**parts, family.autoencoder: Description(read_config(vae)[0], tensors)}
        return Checkpoint(family, parts, {**family.single_file.scheduler, **stated}, sources)
    names = ", ".join(family.name for family in readable)
    raise ValueError(
        f"{path}: expected a whole checkpoint of one of {names}; for a single network name its folder with config.json"
    )
