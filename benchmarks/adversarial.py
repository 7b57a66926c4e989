"""A GAN for comparison with diffusion: of about as many weights as a diffusion model, trained as many seconds.

Relativistic loss with both gradient penalties (R3GAN, Huang et al. 2024, eq. 2 and section 3), class projection in the
critic (Miyato & Koyama 2018), averaged generator (Yaz et al. 2019).
"""

import math
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from diffusion_jax import build
from diffusion_jax.data.transforms import to_float
from diffusion_jax.model import DiffusionModel

PENALTY = 1.0  # gamma of both gradient penalties
LEARNING_RATE = 2e-3  # the best of 1e-3 and 2e-3 for so short a training
WIDTH = 74  # generator and critic together have as many weights as the U-Net of configs/digits.py


class Generator(nn.Module):
    """Noise in the shape of a picture -> picture, called as a network of diffusion is."""

    classes: int
    width: int = WIDTH
    known_channels: int = 0  # this and the next are asked of every network that is sampled
    takes_scale: bool = False
    flow_map: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch size size channels"], t: Float[Array, " batch"], cond: dict) -> Array:
        del t  # there is only the noisiest
        batch, size, _, channels = x.shape
        coarse = (batch, size // 4, size // 4, self.width)
        label = nn.Embed(self.classes, self.width)(cond["label"])
        h = nn.Dense(math.prod(coarse[1:]))(jnp.concatenate([x.reshape(batch, -1), label], axis=-1)).reshape(coarse)
        for factor in (1, 2, 2):
            h = h.repeat(factor, axis=1).repeat(factor, axis=2)
            h = _residual(h, self.width)
        return nn.Conv(channels, (3, 3))(_normed(h))


class Critic(nn.Module):
    """Pictures and their classes -> logits."""

    classes: int
    width: int = WIDTH

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch size size channels"], label: Int[Array, " batch"]
    ) -> Float[Array, " batch"]:
        h = nn.Conv(self.width, (3, 3))(x)
        for factor in (1, 2, 2):
            h = _residual(nn.avg_pool(h, (factor, factor), (factor, factor)), self.width)
        h = nn.leaky_relu(nn.Dense(self.width)(h.reshape(len(h), -1)), 0.2)
        return nn.Dense(1)(h)[:, 0] + (h * nn.Embed(self.classes, self.width)(label)).sum(axis=-1)


def _residual(h: Array, width: int) -> Array:
    change = nn.Conv(width, (3, 3))(nn.leaky_relu(h, 0.2))
    return h + nn.Conv(width, (3, 3), kernel_init=nn.initializers.zeros)(nn.leaky_relu(change, 0.2))


def _normed(h: Array) -> Array:
    return h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)


def trained(config: ConfigDict, model: DiffusionModel, seconds: float) -> DiffusionModel:
    """The averaged generator after so many seconds, compilation left out, as a network that draws in one call.

    model: of diffusion, predicts x0; the generator takes the place of its network at the noisiest level.
    """
    source = build.data.source(config, "train", model.size[0])
    batches = build.data.batches(source, config.train, config.seed, build.data.transform(config, model.size))(0)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    maker, critic = Generator(source.num_classes), Critic(source.num_classes)
    pictures, labels = jnp.zeros((1, *model.shape)), jnp.zeros(1, int)
    params = maker.init(keys[0], pictures, jnp.zeros(1), {"label": labels}), critic.init(keys[1], pictures, labels)
    optimizer = optax.adam(LEARNING_RATE, b1=0.0, b2=0.9)

    def generated(generator: PyTree, label: Array, key: Array) -> Array:
        noise = jax.random.normal(key, (len(label), *model.shape))
        return maker.apply(generator, noise, jnp.zeros(len(label)), {"label": label})

    def slope(judge: PyTree, images: Array, label: Array) -> Array:
        by_image = jax.grad(lambda x: critic.apply(judge, x, label).sum())(images)
        return jnp.square(by_image).sum(axis=(1, 2, 3)).mean()

    @jax.jit
    def step(state: PyTree, images: Array, label: Array, key: Array) -> PyTree:
        (generator, judge), average, (generator_state, critic_state) = state
        real, (first, second) = to_float(images), jax.random.split(key)

        def judged(judge: PyTree) -> Array:
            fake = jax.lax.stop_gradient(generated(generator, label, first))
            lead = critic.apply(judge, real, label) - critic.apply(judge, fake, label)
            steep = sum(slope(judge, x, label) for x in (real, fake))
            return nn.softplus(-lead).mean() + PENALTY / 2 * steep

        def fooled(generator: PyTree) -> Array:
            fake = generated(generator, label, second)
            return nn.softplus(critic.apply(judge, real, label) - critic.apply(judge, fake, label)).mean()

        updates, critic_state = optimizer.update(jax.grad(judged)(judge), critic_state)
        judge = optax.apply_updates(judge, updates)
        updates, generator_state = optimizer.update(jax.grad(fooled)(generator), generator_state)
        generator = optax.apply_updates(generator, updates)
        return (generator, judge), optax.incremental_update(generator, average, 0.02), (generator_state, critic_state)

    state = params, params[0], tuple(map(optimizer.init, params))
    number, end = 0, None
    while end is None or time.monotonic() < end:
        batch = next(batches)
        state = step(state, batch["image"], batch["label"], jax.random.fold_in(keys[2], number))
        jax.block_until_ready(state)
        number, end = number + 1, end or time.monotonic() + seconds
    return model._replace(network=maker, params=state[1])
