"""Whole pipelines in one file, such as those of the original code of Stable Diffusion."""

from pathlib import Path

from diffusion_jax.interop import families
from diffusion_jax.interop.family import Description, Family
from diffusion_jax.interop.tensors import read_file


def read_single_file(path: str | Path, allow_pickle: bool = False) -> tuple[Family, dict[str, Description]]:
    """The family of a checkpoint, and those of its parts that the file has.

    Raises ValueError if no family knows the file, or if it lacks tensors, and the errors of `read_file`.
    """
    tensors = read_file(path, allow_pickle)
    readable = [family for family in families.FAMILIES if family.single_file]
    for family in readable:
        try:
            parts = family.single_file.read(tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{path} lacks or misshapes tensors of {family.name}: {error}") from None
        if parts is not None:
            return family, parts
    names = ", ".join(family.name for family in readable)
    raise ValueError(
        f"{path}: expected a whole checkpoint of one of {names}; for a single network name its folder with config.json"
    )
