"""Check by the TPU compiler whether a config's training step fits a TPU slice. No TPU is needed.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_memory --config=configs/latent_cfg.py:imagenet256 --topology=v5e:2x4

Compiles the second stage's whole step (forward, backward, optimizer, average) for every chip of the slice and prints
bytes for each chip and FLOPs. Nothing is run. Hours of training are estimated from the FLOPs at the given utilisation,
not measured.
"""

from benchmarks import quick, tpu

# isort: split
import sys

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from diffusion_jax import build, parallel
from diffusion_jax.training.step import init_state, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "As for main.py.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", f"The slice, one of {', '.join(tpu.CHIPS)} and its shape.")
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Assumed share of the chips' peak, for the estimate of hours.")
_QUICK = flags.DEFINE_bool("quick", False, quick.HELP)


def main(_) -> None:
    config = _CONFIG.value
    quick.note(_QUICK.value)
    devices, chip = tpu.devices(_TOPOLOGY.value), tpu.chip(_TOPOLOGY.value)
    if "model" in config:
        if _QUICK.value:
            config.model.update(quick.tiny_unet(config.model.to_dict()))
            config.data.size = 64
        with config.model.unlocked():
            config.model.attention_implementation = "xla"
    model, losses = build.model.diffusion_model(config, training=True), []

    def arrays() -> tuple:
        loss, *params_and_frozen = build.objective.objective(config.objective, model, jax.random.key(0))
        losses.append(loss)
        return tuple(params_and_frozen)

    params, frozen = jax.eval_shape(arrays)
    (loss,) = losses
    optimizer = build.objective.optimizer(config.optimizer, config.train.steps)
    strategy = parallel.strategy(config.train.parallel, devices)
    step = make_train_step(loss, optimizer, config.train.ema, config.train.accumulate, strategy)

    state, frozen = strategy.shapes((jax.eval_shape(lambda p: init_state(p, optimizer, 0), params), frozen))
    batch = strategy.batch_shapes(_batch(config, model.codec, model.conditioning))
    cost = tpu.cost(step.lower(state, frozen, batch).compile())

    hours = config.train.steps * cost.flops / (chip.flops * _UTILISATION.value) / 3600
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{config.name} on {_TOPOLOGY.value}: {len(devices)} chips, {config.train.parallel}, "
        f"U-Net of {count / 1e6:.0f}M parameters"
    )
    print(f"  batch {config.train.batch_size}, {config.train.batch_size // len(devices)} a chip")
    print(
        f"  bytes a chip: {cost.total / 1e9:.2f} GB of {chip.memory / 1e9:.0f} GB, "
        f"{cost.temporary / 1e9:.2f} GB of them temporary"
    )
    print(f"  FLOPs a chip and step, as the compiler counts: {cost.flops / 1e12:.2f} T")
    print(f"  estimate: {hours:.0f} h for {config.train.steps} steps at {_UTILISATION.value:.0%} of peak")
    sys.exit(cost.total > chip.memory)


def _batch(config, codec, conditioning):
    """The shapes of a training batch."""
    side, size = config.data.size // codec.factor, config.train.batch_size
    channels = codec.channels if codec.limit else 2 * codec.channels  # pixels, or mean and log variance
    latent = jax.ShapeDtypeStruct((size, side, side, channels), jnp.uint8 if codec.limit else jnp.float32)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), conditioning.null)
    return {"latent": latent, "cond": cond}


if __name__ == "__main__":
    app.run(main)
