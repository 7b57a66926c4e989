"""Prompt -> image."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.guidance import classifier_free, clip_x0
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.sampling import denoiser, initial_noise, sample
from diffusion_jax.core.solvers import Plan
from diffusion_jax.pipelines.codec import Codec


class Pipeline(NamedTuple):
    """A trained model, ready to sample from.

    apply: (params, x (B, h, w, c), t (B,), cond) -> output. params: its weights. convert: `process.from_eps`, `from_x0`
    or `from_v`.
    codec: x0 -> image. null_cond: no condition, leaves without the batch axis. size: of an image, pixels a side.
    """

    apply: Callable[..., Array]
    params: PyTree
    convert: Callable[[Array, Array, NoiseLevel], Prediction]
    codec: Codec
    null_cond: PyTree
    size: int


def text_to_image(
    pipeline: Pipeline,
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: float | Float[Array, "batch"] = 1.0,
    **options,
) -> Float[Array, "batch height width 3"]:
    """Images in about [-1, 1] for a batch of conditions, spread over this host's devices when B divides by their
    number.

    cond: leaves (B, ...), of whatever kind the model was trained with. keys: (B,), one for each image; an image depends
    on its
    key and condition, not on the batch. guidance: scale of classifier-free guidance, 1 for none, one number or (B,).
    options: chunk and callback of `core.sampling.sample`.
    """
    codec = pipeline.codec
    side = pipeline.size // codec.factor
    devices = jax.local_devices() if len(keys) % jax.local_device_count() == 0 else jax.local_devices()[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    keys, cond = jax.device_put((keys, cond), split)
    params, codec_params, null_cond = jax.device_put((pipeline.params, codec.params, pipeline.null_cond), whole)
    denoise = classifier_free(denoiser(pipeline.apply, params, pipeline.convert), guidance, null_cond)
    if codec.limit is not None:
        denoise = clip_x0(denoise, codec.limit)
    noise = initial_noise(keys, (side, side, codec.channels), plan.start)
    x0 = sample(denoise, plan, noise, keys, cond, **options)
    return jax.jit(codec.decode)(codec_params, x0)
