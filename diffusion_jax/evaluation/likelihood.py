"""The likelihood of held-out data under a trained model: both measures of `core.likelihood` in one report."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt8

from diffusion_jax import parallel
from diffusion_jax.core import likelihood
from diffusion_jax.core.guidance import clip_x0
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.data.loader import stack
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Record, Transform
from diffusion_jax.evaluation.batches import map_over_hosts
from diffusion_jax.evaluation.records import good_records
from diffusion_jax.evaluation.summary import summary
from diffusion_jax.messages import Progress
from diffusion_jax.model import DiffusionModel

REPORTED = ("images", "steps", "probes", "terms", "batch_size", "seed")  # settings that change the results


def check_section(section, schedule: Schedule) -> None:
    """Raise ValueError for a config.eval that `evaluate_likelihood` cannot use with this schedule."""
    T = schedule.num_steps
    if T and section.steps >= T:
        raise ValueError(f"eval.steps must be less than the schedule's {T} steps, got {section.steps}")


def evaluate_likelihood(model: DiffusionModel, source: Source, transform: Transform, section) -> dict:
    """Report the likelihood of a source under a model, given the captions or classes. Lower is better.

    "flow" is the negative log likelihood by the probability flow. "bound" is the variational bound with its terms. Both
    are means over images with their standard errors.

    - A model of pixels: bits/dim. Both are upper bounds on those of the image, the flow's because of uniform
      dequantization.
    - A model of latents: nats for each value of the latent, for one sample of the first stage's posterior, with a
      Gaussian decoder in the bound. Such a model has no density of pixels.

    No guidance is used, because a guided prediction has no density. x0 is clipped to the range of pixels in the bound,
    as in sampling, but not in the flow, which differentiates it.

    section: config section with images (in an order shuffled by seed; all if there are fewer), steps and probes (see
      `core.likelihood.log_likelihood`), terms (see `variational_bound`; 0 for all), batch_size, seed. Check it by
      `check_section` first.
    Raises ValueError if no record of the source can be read.
    """
    total = min(section.images, len(source))
    size = parallel.divisible(min(section.batch_size, total))
    model, names = model.placed(), []
    readable = (record for _, record in itertools.islice(good_records(source, transform, section.seed), total))

    def figures_of(numbered: list[tuple[int, Record]]) -> Float[np.ndarray, "images figures"]:
        numbers, records = zip(*numbered, strict=True)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(section.seed), np.array(numbers))
        batch = stack(records)
        conditioning = model.conditioning
        cond = conditioning.embed(conditioning.params(), conditioning.of_records(batch))
        cond = conditioning.with_sizes(cond, batch)
        figures = _figures(model, batch["image"], cond, keys, section)
        names[:] = figures
        return np.stack([np.asarray(values) for values in figures.values()], axis=1)

    results, numbered = [], enumerate(readable)
    with Progress("likelihood", total, "images") as bar:
        while part := list(itertools.islice(numbered, size * jax.process_count())):
            results += map_over_hosts(figures_of, part, size, size)
            bar.update(len(part))
    figures = {name: summary(values) for name, values in zip(names, np.stack(results, axis=1), strict=True)}
    units = {"of": "pixels", "unit": "bits/dim"} if _is_pixel_model(model) else {"of": "latents", "unit": "nats/dim"}
    return {name: section[name] for name in REPORTED} | {"data": source.name, "images": len(results)} | units | figures


def _figures(
    model: DiffusionModel,
    images: UInt8[np.ndarray, "batch height width 3"],
    cond: PyTree,
    keys: Key[Array, "batch"],
    section,
) -> dict[str, Float[Array, "batch"]]:
    """The results of each image by name, computed on this host's devices."""
    codec, pixels, schedule = model.codec, _is_pixel_model(model), model.schedule
    x0_keys, spread_keys, flow_keys, bound_keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys).T
    x0 = jnp.asarray(codec.sample(codec.stats, codec.encode(codec.params, images), x0_keys))
    x = likelihood.dequantize(x0, spread_keys) if pixels else x0
    x0, x, cond, flow_keys, bound_keys = parallel.spread((x0, x, cond, flow_keys, bound_keys), len(images))

    network = model.denoiser(parallel.whole(model.params, len(images)))
    nats = -likelihood.log_likelihood(network, schedule, x, flow_keys, cond, steps=section.steps, probes=section.probes)
    bound = likelihood.variational_bound(
        clip_x0(network, codec.limit) if pixels else network,
        schedule,
        x0,
        bound_keys,
        cond,
        terms=section.terms or None,
        decoder=likelihood.pixel_decoder if pixels else likelihood.gaussian_decoder,
    )

    def per_dim(nats: Array, bin: float = 1.0) -> Array:
        return likelihood.bits_per_dim(nats, x0[0].size, bin) if pixels else nats / x0[0].size

    terms = {f"bound_{name}": per_dim(term) for name, term in bound._asdict().items()}
    return {"flow": per_dim(nats, likelihood.PIXEL), "bound": per_dim(bound.total)} | terms


def _is_pixel_model(model: DiffusionModel) -> bool:
    return model.codec.limit is not None
