"""The smallest model that trains like a diffusion model, with separate noise for each example."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source

WIDTH = 3


def initial() -> dict:
    return {"w": jnp.linspace(-1.0, 1.0, WIDTH), "b": jnp.zeros(())}


def loss(params, frozen, batch, keys):
    """Squared error of a two-layer rule against a noisy target; a factor frozen["gain"] on the input."""
    noise = jax.vmap(jax.random.normal)(keys)
    prediction = jnp.tanh(frozen["gain"] * batch["x"] @ params["w"]) + params["b"]
    error = jnp.square(prediction - batch["y"] - 0.3 * noise)
    return jnp.mean(error), {"mse": jnp.mean(error)}


FROZEN = {"gain": np.float32(2.0)}


def batch(size: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(size, WIDTH)).astype(np.float32), "y": rng.normal(size=size).astype(np.float32)}


def batches(batch_size: int, records: int = 32, seed: int = 0, **share):
    """step -> endless shuffled batches; share: process_index and process_count."""
    source = Source("linear", records, lambda i: {k: v[0] for k, v in batch(1, i).items()})
    return lambda start: loader(source, batch_size, seed, start=start, **share)


def lasting(line: dict) -> dict:
    """What a line of metrics.jsonl says that does not differ from run to run."""
    differs = ("images_per_second", "step_seconds", "utilisation", "share/", "records/", "memory_gib/")
    return {name: value for name, value in line.items() if not name.startswith(differs)}


def section(**fields) -> ConfigDict:
    """A config section as `fit` takes it."""
    return ConfigDict(
        {
            "steps": 12,
            "batch_size": 8,
            "accumulate": 1,
            "parallel": "pmap",
            "ema": 0.9,
            "log_every": 2,
            "checkpoint_every": 4,
            "snapshot_every": 100,
            "max_bad_steps": 3,
            "post_hoc": False,
        }
        | fields
    )
