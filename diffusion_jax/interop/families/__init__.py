"""Published families of models: a card for each. Code for published models asks the card and names no family.

A new family is a card in a file of its own, listed in FAMILIES, and what it needs of networks in `models`. The first
card that recognises a folder or a file describes it.
"""

from diffusion_jax.interop.families import (
    dit,
    flux2_klein,
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
    z_image,
)
from diffusion_jax.interop.family import Family

FAMILIES: tuple[Family, ...] = (
    stable_diffusion_xl.REFINER,
    stable_diffusion_xl.FAMILY,
    stable_diffusion_2.FAMILY,
    stable_diffusion_1.FAMILY,
    dit.FAMILY,
    dit.SIT,
    flux2_klein.FAMILY,
    z_image.FAMILY,
)
