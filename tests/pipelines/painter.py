"""A model with a known solution: the best denoiser of Gaussian pixels, and a codec of blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import codec as codecs
from diffusion_jax.codec import pixels
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.core import parameterization, schedules
from diffusion_jax.model import DiffusionModel, Network

SIZE = 8
SCHEDULE = schedules.flow()  # its noisiest time is pure noise
VARIANCE = 0.04


def gaussian(params, x, t, cond):
    """The best x0 when pixels are independent, of mean cond["grey"] and a variance of 0.04, on the flow schedule."""
    sigma = t[:, None, None, None] / 1000
    alpha = 1 - sigma
    mean = params * cond["grey"]
    return mean + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * mean)


def blocks() -> codecs.Codec:
    """Latents are the means of 2 x 2 pixels."""

    def encode(params, images):
        images = jnp.asarray(pixels(images))
        return images.reshape(len(images), SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))

    return codecs.identity()._replace(
        encode=encode,
        sample=_as_it_is,
        decode=lambda params, x0: jnp.repeat(jnp.repeat(x0, 2, axis=1), 2, axis=2),
        factor=2,
        limit=None,
    )


def _as_it_is(stats, record, keys):
    return record


def painted(apply, params, null, size=SIZE, schedule=SCHEDULE, codec=None) -> DiffusionModel:
    """A pixel model whose network predicts x0, and whose conditions are used unchanged."""
    conditioning = Conditioning(lambda: "", lambda records: records, lambda prompts: prompts, null)
    codec = codec or codecs.identity()
    return DiffusionModel(Network(apply), params, schedule, parameterization.x0, codec, conditioning, (size, size))


PIXELS = painted(gaussian, jnp.float32(1), {"grey": np.zeros((1, 1, 1))})
LATENTS = PIXELS._replace(codec=blocks())


def told(*greys):
    """A condition for each image: the grey value to generate."""
    return {"grey": jnp.array(greys, jnp.float32)[:, None, None, None]}


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def photographs(count, seed=0):
    """Images with something in every pixel."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
