"""Prompt -> image."""

from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import CallbackLike, GuidanceLike, from_noise, noise


def text_to_image(
    model: DiffusionModel,
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
) -> Float[Array, "batch height width 3"]:
    """Generate images for a batch of conditions. Returns images in about [-1, 1].

    This host's devices share the batch if B is divisible by their number.

    model: from `build.weights.load_model` or `published.from_published`.

    cond: leaves (B, ...), of the kind that the model was trained with, e.g. from `model.conditioning.of_prompts`.
    keys: (B,), one for each image. An image depends on its key and condition, not on the batch.
    plan: a solver, from `core.solvers`.
    guidance: scale of classifier-free guidance, () or (B,), 1 for none; or a `Guidance`.
    callback: called with (rows done, prediction of x0) after each chunk of rows, or as `generate.Every` says. Sampling
      stops if it returns True.
    Raises ValueError as `generate.solve` does.
    """
    return from_noise(model, noise(model, keys, plan.initial), cond, keys, plan, guidance, callback)
