"""Denoisers of models that are trained here, of any kind: folders in the format of diffusers."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax.interop import folders
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.models.unet import UNet
from diffusion_jax.paths import Path

NAMES = {UNet: "unet", Transformer: "transformer"}  # of the folder in an export, and of the network in files of LoRA


def name_of(module: UNet | Transformer) -> str:
    """The name of a denoiser, by its kind."""
    return NAMES[type(module)]


def find_denoiser(folder: Path) -> Path | None:
    """The folder of the denoiser inside that of an export; None without one."""
    return next((folder / name for name in NAMES.values() if (folder / name).exists()), None)


def load_denoiser(folder: str | Path, scan: bool = False) -> tuple[Any, PyTree]:
    """The network of a folder and its variables, float32.

    scan: of a transformer, see there. Errors as of `load_unet`.
    """
    if folders.read_config(folder)[0].get("_class_name") in folders.TRANSFORMERS:
        return folders.load_transformer(folder, scan=scan)
    return folders.load_unet(folder)


def save_denoiser(
    module: UNet | Transformer, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32
) -> None:
    """Write a folder that `load_denoiser` reads, and diffusers if it has this network. dtype: of the stored tensors."""
    {UNet: folders.save_unet, Transformer: folders.save_transformer}[type(module)](module, variables, folder, dtype)
