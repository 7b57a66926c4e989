"""Does a config's training step fit a TPU slice? Asks the TPU compiler, which needs no TPU.

    pip install "jax[tpu]"
    python benchmarks/tpu_memory.py --config=configs/latent_cfg.py:imagenet256 --topology=v5e:2x4

Compiles the second stage's whole step (forward, backward, optimizer, average) for every chip of the slice and prints
bytes for each chip and FLOPs. Nothing is run: hours of training are what the FLOPs take at the utilisation given, an
estimate and no measurement.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from diffusion_jax import build, stages
from diffusion_jax.pipelines import codec as codecs
from diffusion_jax.training.step import init_state, make_train_step

CHIPS = {
    "v5e": (16e9, 197e12),
    "v6e": (32e9, 918e12),
    "v5p": (95e9, 459e12),
    "v4": (32e9, 275e12),
}  # bytes, bf16 FLOP/s

_CONFIG = config_flags.DEFINE_config_file("config", None, "As for main.py.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", f"The slice, one of {', '.join(CHIPS)} and its shape.")
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Assumed share of the chips' peak, for the estimate of hours.")


def main(_) -> None:
    config = _CONFIG.value
    devices = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value).devices
    model = build.model(config, training=True)
    model = model._replace(unet=model.unet.clone(attention_implementation="xla"))
    codec = codecs.identity()
    if config.autoencoder.kind == "kl":
        codec = codecs.autoencoder_kl(build.autoencoder(config), {})
    loss = stages.denoiser_loss(config, model, codec)
    optimizer = build.optimizer(config.optimizer, config.train.steps)
    step = make_train_step(loss, optimizer, config.train.ema, config.train.accumulate, devices)

    params = jax.eval_shape(lambda: stages.trainable(model, 0))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, 0), params)
    frozen = {"codec": codec.stats, "null_cond": model.conditioning.null, "base": {}}
    compiled = step.lower(state, frozen, _batch(config, codec, model.conditioning, len(devices))).compile()

    name = _TOPOLOGY.value.split(":")[0]
    capacity, peak = CHIPS[name]
    memory = compiled.memory_analysis()
    # the donated state's buffers are the new state's: counted once
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    total -= memory.alias_size_in_bytes
    flops = compiled.cost_analysis()["flops"]
    hours = config.train.steps * flops / (peak * _UTILISATION.value) / 3600
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{config.name} on {_TOPOLOGY.value}: {len(devices)} chips, U-Net of {count / 1e6:.0f}M parameters")
    print(f"  batch {config.train.batch_size}, {config.train.batch_size // len(devices)} a chip")
    print(
        f"  bytes a chip: {total / 1e9:.2f} GB of {capacity / 1e9:.0f} GB, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} GB of them temporary"
    )
    print(f"  FLOPs a chip and step, as the compiler counts: {flops / 1e12:.2f} T")
    print(f"  estimate: {hours:.0f} h for {config.train.steps} steps at {_UTILISATION.value:.0%} of peak")
    sys.exit(total > capacity)


def _batch(config, codec, conditioning, num_devices):
    """The shapes of a training batch, split over the chips."""
    side = config.data.size // codec.factor
    channels = codec.channels if codec.limit else 2 * codec.channels  # pixels, or mean and log variance
    lead = (num_devices, config.train.batch_size // num_devices)
    latent = jax.ShapeDtypeStruct((*lead, side, side, channels), jnp.uint8 if codec.limit else jnp.float32)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), conditioning.null)
    return {"latent": latent, "cond": cond}


if __name__ == "__main__":
    app.run(main)
