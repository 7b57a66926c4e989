"""Whole pipelines in one file, such as those of the original code of Stable Diffusion, and denoisers alone."""

from typing import NamedTuple

import numpy as np

from diffusion_jax import paths
from diffusion_jax.interop import families
from diffusion_jax.interop.family import Config, Description, Family, Tensors
from diffusion_jax.interop.folders import WEIGHTS, read_config
from diffusion_jax.interop.originals import renamed
from diffusion_jax.interop.quantized import dequantized
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
    tensors, header = _read(path, allow_pickle)
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
        if vae and family.autoencoder in parts:
            raise ValueError(f"vae={str(vae)!r} is for a file without an autoencoder, and {path} has its own")
        if vae:
            tensors, sources[family.autoencoder] = read_tensors(vae, WEIGHTS, allow_pickle)
            parts = {**parts, family.autoencoder: Description(read_config(vae)[0], tensors)}
        return Checkpoint(family, parts, {**family.single_file.scheduler, **stated}, sources)
    names = ", ".join(family.name for family in readable)
    raise ValueError(
        f"{path}: expected a whole checkpoint of one of {names}; for a denoiser alone name the folder of its pipeline "
        "as the checkpoint, and this file as denoiser"
    )


def read_denoiser(
    path: str | Path, family: Family, config: Config, source: str | Path, allow_pickle: bool = False
) -> Description:
    """The denoiser of a file that has nothing else, with the tensor names of the folder or of the original code.

    family: of the pipeline that it belongs to.
    config: config.json of the denoiser that it replaces, whose path is `source`.
    Raises ValueError for a file with other tensors, a quantization that is not supported, and one that does not fit the
      other parts, and the errors of `read_file`.
    """
    names, module = family.names, family.parts[family.denoiser].build(config, source)[0]
    tensors, header = _read(path, allow_pickle)
    try:
        tensors = renamed(
            _alone(dequantized(tensors, header), family),
            lambda map_path: names.places(family.denoiser, map_path, module),
        )
        return Description({**config, **family.sizes_of(tensors, config)}, tensors)
    except KeyError as error:
        raise ValueError(f"{path}: expected the denoiser of {family.name}, it lacks {error}") from None
    except (IndexError, TypeError, ZeroDivisionError) as error:  # of a tensor with too few axes, or an empty one
        raise ValueError(f"{path}: it misshapes tensors of {family.name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _alone(tensors: Tensors, family: Family) -> Tensors:
    """The tensors without their prefix, if they have one. Raises ValueError for tensors without it."""
    dotted = [name for name, part in family.names.dotted.items() if part == family.denoiser]
    prefixes = {f"{prefix}." for prefix in (*dotted, family.denoiser)}
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)]
    prefix = max(found, key=len, default="")
    others = sorted(name for name in tensors if not name.startswith(prefix))
    if others:
        first = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(f"expected the denoiser of {family.name} alone, it also has {first}")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read(path: str | Path, allow_pickle: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file, and the metadata of its header."""
    has_header = paths.at(path).suffix == ".safetensors"
    return read_file(path, allow_pickle), read_metadata(path) if has_header else {}
