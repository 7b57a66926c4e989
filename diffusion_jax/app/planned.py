"""A training before it starts: what its steps take and compute, as shapes, without weights and without the devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, parallel
from diffusion_jax import codec as codecs
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import train
from diffusion_jax.core import sampling
from diffusion_jax.core.guidance import guided
from diffusion_jax.flops import flops
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import with_guidance_scale
from diffusion_jax.training.step import TrainState, init_state, make_train_step


class Stage(NamedTuple):
    """One of the trainings of a config.

    name: of the stage.
    train: its section of the config.
    loss, optimizer: as of `loop.Task`.
    params, frozen: shapes of what is trained, and of what else the loss takes.
    example: shapes of one example of a batch.
    model: whose denoiser it trains; None for an autoencoder.
    """

    name: str
    train: ConfigDict
    loss: Callable
    optimizer: Any
    params: PyTree
    frozen: PyTree
    example: PyTree
    model: DiffusionModel | None = None

    @property
    def state(self) -> TrainState:
        """The shapes of the state."""
        return jax.eval_shape(lambda params: init_state(params, self.optimizer, 0, self.train.post_hoc), self.params)

    def batch(self, size: int) -> PyTree:
        """The shapes of so many examples."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), self.example)

    def step(self, strategy: parallel.Strategy) -> Callable:
        """The training step."""
        return make_train_step(self.loss, self.optimizer, self.train.ema, self.train.accumulate, strategy)

    def lowered(self, strategy: parallel.Strategy, batch_size: int) -> jax.stages.Lowered:
        """The step for the strategy's devices, to be compiled."""
        state, frozen = strategy.shapes((self.state, self.frozen))
        return self.step(strategy).lower(state, frozen, strategy.batch_shapes(self.batch(batch_size)))

    def flops(self, devices: int) -> float:
        """FLOPs of a step on all devices together."""
        alone = parallel.alone()
        share = alone.batch_shapes(self.batch(self.train.batch_size // devices))
        return devices * flops(self.step(alone), self.state, self.frozen, share)


def denoiser(config: ConfigDict, model: DiffusionModel, several_captions: bool) -> Stage:
    """The training of a denoiser. several_captions: whether a record has a choice of them."""
    whole, model = model, train.as_in_step(model, several_captions)

    def objective(params: PyTree, stats: PyTree) -> tuple[Callable, PyTree, PyTree]:
        network = model.network._replace(init=lambda key: params) if "checkpoint" in config else model.network
        codec = model.codec._replace(stats=stats)
        return train.objective(config, model._replace(params=params, network=network, codec=codec))

    loss, params, frozen = _shapes(objective, model.params, model.codec.stats)
    return Stage(
        name="denoiser",
        train=config.train,
        loss=loss,
        optimizer=build.objective.optimizer(config.optimizer, config.train.steps),
        params=params,
        frozen=frozen,
        example=_example(model, several_captions),
        model=whole,
    )


def _shapes(objective: Callable[..., tuple[Callable, PyTree, PyTree]], *args: PyTree) -> tuple:
    """(loss, shapes of what is trained, shapes of what is frozen) of `objective(*args)`, which is not computed."""
    losses = []

    def arrays(*args: PyTree) -> tuple[PyTree, PyTree]:
        loss, trained, frozen = objective(*args)
        losses.append(loss)
        return trained, frozen

    trained, frozen = jax.eval_shape(arrays, *args)
    return losses[0], trained, frozen


def _example(model: DiffusionModel, several_captions: bool) -> PyTree:
    """The shapes of a record in training."""
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *np.shape(leaf)), leaf.dtype), model.conditioning.null)
    cond = jax.eval_shape(conditionings.stored, cond)
    if several_captions:
        sizes = {name: leaf for name, leaf in cond.items() if name == model.conditioning.sizes}
        cond = jax.eval_shape(lambda: model.conditioning.of_records({"caption": [""]})) | sizes
    latent = jax.eval_shape(lambda *inputs: codecs.stored(model.codec.encode(*inputs)), *_encoder_inputs(model))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), {"latent": latent, "cond": cond})


def _encoder_inputs(model: DiffusionModel) -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """Weights and an image for the codec."""
    return model.codec.params, jax.ShapeDtypeStruct((1, *model.size, 3), np.uint8)


def encoder_flops(model: DiffusionModel) -> float:
    """FLOPs of the codec for an image on its way into the cache."""
    return flops(model.codec.encode, *_encoder_inputs(model))


def first_stage(config: ConfigDict) -> Stage:
    """The training of an autoencoder."""
    section, size = config.autoencoder, config.data.size
    model = build.model.autoencoder(config)
    loss, params, frozen = _shapes(lambda: build.objective.objective(section.loss, model, jax.random.key(config.seed)))
    return Stage(
        name="autoencoder",
        train=section.train,
        loss=loss,
        optimizer=build.objective.optimizer(section.optimizer, section.train.steps),
        params=params,
        frozen=frozen,
        example={"image": jax.ShapeDtypeStruct((size, size, 3), np.uint8)},
    )


class Sampling(NamedTuple):
    """A batch of pictures from noise to pixels, as shapes.

    run: (weights, batch) -> images.
    weights: of the network and of the codec.
    batch: initial noise, keys and conditions.
    """

    run: Callable
    weights: PyTree
    batch: PyTree


def sampling_of(config: ConfigDict, model: DiffusionModel, devices: int) -> Sampling:
    """A batch of config.sample, shared by these devices."""
    plan, guidance = build.sampling.plan_and_guidance(config, model, 1.0, None)
    images = min(config.sample.batch_size, len(config.sample.prompts) * config.sample.num_images)
    rows, count = sampling.rows(plan), images + -images % devices

    def run(weights: PyTree, batch: PyTree) -> jax.Array:
        params, decoder = weights
        cond, scaled = with_guidance_scale(model, batch["cond"], guidance)
        denoise = guided(model.denoiser(params), scaled, model.conditioning.null, model.codec.limit)
        keys = jax.random.wrap_key_data(batch["keys"])
        return model.codec.decode(decoder, sampling.run_rows(denoise, rows, batch["x"], keys, cond))

    cond = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *np.shape(leaf)), leaf.dtype), model.conditioning.null
    )
    batch = {
        "x": jax.ShapeDtypeStruct((count, *model.shape), np.float32),
        "keys": jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), count))),
        "cond": cond,
    }
    return Sampling(run, (model.params, model.codec.params), batch)
