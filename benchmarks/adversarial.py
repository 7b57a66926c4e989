"""A GAN for comparison with diffusion: the same U-Net, which turns noise into a picture in one call.

Hinge loss (Lim & Ye 2017), a discriminator with class projection (Miyato & Koyama 2018), averaged generator.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from diffusion_jax.app import build
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.data.transforms import to_float
from diffusion_jax.model import DiffusionModel


class Discriminator(nn.Module):
    """Pictures of 8 x 8 and their classes -> logits."""

    classes: int
    channels: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: Float[Array, "batch 8 8 3"], label: Int[Array, " batch"]) -> Float[Array, " batch"]:
        for i, width in enumerate(self.channels):
            conv = nn.Conv(width, (3, 3), strides=1 if i == 0 else 2)
            x = nn.leaky_relu(conv(x), 0.2)
        x = x.sum(axis=(1, 2))
        return nn.Dense(1)(x)[:, 0] + (x * nn.Embed(self.classes, x.shape[-1])(label)).sum(axis=-1)


def trained(config: ConfigDict, model: DiffusionModel, seconds: float) -> PyTree:
    """The averaged weights of the generator after so many seconds, compilation left out.

    model: its network predicts x0, and is only asked at the noisiest level.
    """
    source = build.source(config, "train", model.size[0])
    transform = build.transform(config, model.size)
    batches = build.batches(source, config.train, config.seed, transform)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    critic = Discriminator(source.num_classes)
    params = model.network.init(keys[0]), critic.init(keys[1], jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, int))
    optimizer = optax.adam(2e-4, b1=0.5, b2=0.99)
    level = NoiseLevel(*map(jnp.float32, model.schedule(model.schedule.t_max)))

    def generated(generator: PyTree, label: Array, key: Array) -> Array:
        noise = jax.random.normal(key, (len(label), *model.shape))
        return model.network.apply(generator, noise, jnp.full(len(label), level.t), {"label": label})

    @jax.jit
    def step(state: PyTree, images: Array, label: Array, key: Array) -> PyTree:
        (generator, judge), average, (own, others) = state
        first, second = jax.random.split(key)

        def judged(judge: PyTree) -> Array:
            made = jax.lax.stop_gradient(generated(generator, label, first))
            real, fake = (critic.apply(judge, x, label) for x in (to_float(images), made))
            return jnp.mean(nn.relu(1 - real) + nn.relu(1 + fake))

        updates, others = optimizer.update(jax.grad(judged)(judge), others)
        judge = optax.apply_updates(judge, updates)
        fooled = jax.grad(lambda g: -critic.apply(judge, generated(g, label, second), label).mean())(generator)
        updates, own = optimizer.update(fooled, own)
        generator = optax.apply_updates(generator, updates)
        return (generator, judge), optax.incremental_update(generator, average, 0.01), (own, others)

    state = params, params[0], tuple(map(optimizer.init, params))
    number, end = 0, None
    while end is None or time.monotonic() < end:
        batch = next(batches)
        state = step(state, batch["image"], batch["label"], jax.random.fold_in(keys[2], number))
        jax.block_until_ready(state)
        number, end = number + 1, end or time.monotonic() + seconds
    return state[1]
