"""Image, mask and prompt -> image, generated where the mask is 1."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from diffusion_jax.codec import Images, pixels
from diffusion_jax.core.sampling import keep
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import CallbackLike, GuidanceLike, encode, from_noise
from diffusion_jax.pipelines.image_to_image import noised


def inpaint(
    model: DiffusionModel,
    image: Images,
    mask: Shaped[Array | np.ndarray, "..."],
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
) -> Float[Array, "batch height width 3"]:
    """Generate the image where mask is 1, and keep it where mask is 0. There the result equals the image exactly.

    An inpainting model (`Network.known_channels`) gets the known part as a condition: the mask, 1 for generated latent
    cells, and the latent of the image without its masked pixels (Rombach et al. 2022, section 4.5). With any other
    model the known part is replaced at every level of the plan (Lugmayr et al. 2022, algorithm 1).

    image: (B, H, W, 3), uint8 or in [-1, 1], of the model's size.
    mask: (B or 1, H, W, 1), in [0, 1]. Values between blend. Every latent cell that overlaps the mask is generated.
    plan: from pure noise, or on `solvers.strength_times` to start from the old content.
      `solvers.with_resampling(plan, repeats)` makes the parts match better.
    Other arguments as in `text_to_image`.
    Raises ValueError for a mask of another shape.
    """
    if mask.shape not in [(batch, *image.shape[1:3], 1) for batch in (1, len(image))]:
        raise ValueError(f"a mask must be of shape (B or 1, H, W, 1) for images of {image.shape}, got {mask.shape}")
    mask = jnp.asarray(mask, jnp.float32)
    result = pixels(image)
    if plan.num_rows:
        x0 = encode(model, image)
        x = noised(model, x0, keys, plan)
        if model.network.known_channels:
            cond, known = cond | {"known": inpainting_condition(model, image, mask)}, None
        else:
            known = keep(x0, jnp.broadcast_to(_overlapping_cells(mask, model.codec.factor), (*x0.shape[:3], 1)))
        result = from_noise(model, x, cond, keys, plan, guidance, callback, known)
    return mask * result + (1 - mask) * pixels(image)


def inpainting_condition(
    model: DiffusionModel, image: Images, mask: Float[Array, "#batch height width 1"]
) -> Float[Array, "batch h w c"]:
    """The condition (B, h, w, 1 + channels) of an inpainting model: the mask, sampled at the corner of each cell, and
    the latent of the image with grey instead of its masked pixels.
    """
    masked, factor = mask > 0.5, model.codec.factor
    latent = encode(model, jnp.where(masked, 0.0, pixels(image)))
    cells = jnp.broadcast_to(masked[:, ::factor, ::factor], (*latent.shape[:3], 1))
    return jnp.concatenate([cells.astype(latent.dtype), latent], axis=-1)


def _overlapping_cells(mask: Float[Array, "batch height width 1"], factor: int) -> Float[Array, "batch h w 1"]:
    """1 for each cell of factor x factor pixels that overlaps the mask, else 0."""
    batch, height, width, _ = mask.shape
    cells = mask.reshape(batch, height // factor, factor, width // factor, factor)
    return jnp.any(cells > 0, axis=(2, 4))[..., None].astype(mask.dtype)
