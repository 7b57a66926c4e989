"""Whole pipelines in one file, such as those of the original code of Stable Diffusion."""

from typing import NamedTuple

from diffusion_jax import paths
from diffusion_jax.interop import families
from diffusion_jax.interop.family import Config, Description, Family
from diffusion_jax.interop.tensors import read_file, read_metadata
from diffusion_jax.paths import Path


class Checkpoint(NamedTuple):
    """The content of a file: its family, those of the parts that it has, and scheduler_config.json."""

    family: Family
    parts: dict[str, Description]
    scheduler: Config


def read_checkpoint(path: str | Path, allow_pickle: bool = False) -> Checkpoint:
    """The content of a checkpoint in one file.

    Raises ValueError if no family knows the file, if it lacks tensors, or if a tensor or a field of its header is not
    supported, and the errors of `read_file`.
    """
    tensors = read_file(path, allow_pickle)
    header = read_metadata(path) if paths.at(path).suffix == ".safetensors" else {}
    readable = [family for family in families.FAMILIES if family.single_file]
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
        return Checkpoint(family, parts, {**family.single_file.scheduler, **stated})
    names = ", ".join(family.name for family in readable)
    raise ValueError(
        f"{path}: expected a whole checkpoint of one of {names}; for a single network name its folder with config.json"
    )
