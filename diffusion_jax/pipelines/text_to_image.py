"""Prompt -> image."""

from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.solvers import Plan
from diffusion_jax.pipelines.pipeline import Guided, Pipeline, from_noise, noise


def text_to_image(
    pipeline: Pipeline,
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: Guided = 1.0,
    **options,
) -> Float[Array, "batch height width 3"]:
    """Images in about [-1, 1] for a batch of conditions, spread over this host's devices when B divides by their
    number.

    cond: leaves (B, ...), of whatever kind the model was trained with. keys: (B,), one for each image; an image depends
    on its key and condition, not on the batch. guidance: scale of classifier-free guidance, 1 for none, one number or
    (B,); or a `Guidance`. options: chunk and callback of `core.sampling.sample`.
    """
    return from_noise(pipeline, noise(pipeline, keys, plan.start), cond, keys, plan, guidance, **options)
