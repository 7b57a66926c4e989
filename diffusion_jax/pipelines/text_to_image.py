"""Prompt -> image."""

from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import Callback, Guided, from_noise, noise


def text_to_image(
    model: DiffusionModel,
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: Guided = 1.0,
    callback: Callback = None,
) -> Float[Array, "batch height width 3"]:
    """Images in about [-1, 1] for a batch of conditions, spread over this host's devices when B divides by their
    number.

    cond: leaves (B, ...), of whatever kind the model was trained with, such as `model.conditioning.of_prompts` makes.
    keys: (B,), one for each image. An image depends on its key and condition, not on the batch.
    plan: a solver, from `core.solvers`.
    guidance: scale of classifier-free guidance, 1 for none, one number or (B,); or a `Guidance`.
    callback: after each chunk of rows called with (rows done, prediction of x0); returning True stops there.
    Raises ValueError as `generate.solve` does.
    """
    return from_noise(model, noise(model, keys, plan.initial), cond, keys, plan, guidance, callback)
