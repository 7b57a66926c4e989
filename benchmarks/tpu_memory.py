"""Check by the TPU compiler whether a config's training step fits TPU slices. No TPU is needed.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_memory --config=configs/latent_cfg.py:imagenet256 --topology=v5e:2x4
    python -m benchmarks.tpu_memory --config=configs/stable_diffusion.py --config.checkpoint=sdxl --config.remat \\
        --topology=v5e:4x4,v6e:2x4 --parallel=fsdp --batch=1,4

Compiles the second stage's whole step (forward, backward, optimizer, average) for every chip of a slice and prints a
row with the bytes of each chip and the FLOPs. Nothing is run. `--config.checkpoint=sd15` or `sdxl` takes the shapes of
these networks, so no weights are needed. Hours of training are estimated from the FLOPs at the given utilisation, not
measured.
"""

from benchmarks import quick, tpu

# isort: split
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags

from benchmarks.tpu_sampling import MODELS, TOKENS
from diffusion_jax import build, parallel
from diffusion_jax.codec import autoencoder_kl
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.core import parameterization, schedules
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.unet import UNet
from diffusion_jax.training.step import init_state, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "As for main.py.")
_TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x4"], f"Slices, each one of {', '.join(tpu.CHIPS)} and its shape.")
_PARALLEL = flags.DEFINE_list("parallel", None, "Values of config.train.parallel; by default that of the config.")
_BATCH = flags.DEFINE_list("batch", None, "Examples a chip in a micro-batch; by default what the config comes to.")
_LEVEL = flags.DEFINE_enum("level", "O1", ["O0", "O1", "O2", "O3"], "Effort of the compiler, as in LLVM.")
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Assumed share of the chips' peak, for the estimate of hours.")
_QUICK = flags.DEFINE_bool("quick", False, quick.HELP)
TIME_IDS = 6  # of SDXL: original size, crop, target size


def main(_) -> None:
    config = _CONFIG.value
    quick.note(_QUICK.value)
    jax.config.update("jax_optimization_level", _LEVEL.value)
    if _QUICK.value and "model" in config:
        config.model.update(quick.tiny_unet(config.model.to_dict()))
        config.data.size = 64
    model = _published(config) if "checkpoint" in config else build.model.diffusion_model(config, training=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{config.name}, {model.size[0]} x {model.size[1]} pixels, U-Net of {count / 1e6:.0f}M parameters\n")
    columns = "slice", "parallel", "images a chip", "micro-batches", "state", "temporary", "total", "FLOPs a chip"
    columns += f"{config.train.steps} steps at {_UTILISATION.value:.0%} of peak", "compiled in"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for topology in _TOPOLOGY.value:
        for name in _PARALLEL.value or [config.train.parallel]:
            for batch in _BATCH.value or [0]:
                print(_row(config, model, topology, name, int(batch)), flush=True)


def _row(config: ConfigDict, model: DiffusionModel, topology: str, parallel_name: str, micro_batch: int) -> str:
    """A row of the table. micro_batch: examples a chip, 0 for those of the config."""
    start, devices, chip = time.perf_counter(), tpu.devices(topology), tpu.chip(topology)
    accumulate = config.train.accumulate
    share = micro_batch * accumulate or config.train.batch_size // len(devices)
    head = f"| {topology} | {parallel_name} | {share // accumulate} | {accumulate}"
    try:
        cost = tpu.cost(_step(config, model, parallel.strategy(parallel_name, devices), share * len(devices)).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"{head} | does not fit: {str(error).splitlines()[0]}"
    hours = config.train.steps * accumulate * cost.flops / (chip.flops * _UTILISATION.value) / 3600
    return (
        f"{head} | {cost.arguments / 1e9:.2f} GB | {cost.temporary / 1e9:.2f} GB | "
        f"{cost.total / 1e9:.2f} of {chip.memory / 1e9:.0f} GB | {cost.flops / 1e12:.2f} T | {hours:.0f} h | "
        f"{time.perf_counter() - start:.0f} s |"
    )


def _step(
    config: ConfigDict, model: DiffusionModel, strategy: parallel.Strategy, batch_size: int
) -> jax.stages.Lowered:
    """The training step of a global batch."""
    losses = []

    def arrays() -> tuple:
        loss, *params_and_frozen = build.objective.objective(config.objective, model, jax.random.key(0))
        losses.append(loss)
        return tuple(params_and_frozen)

    params, frozen = jax.eval_shape(arrays)
    (loss,) = losses
    optimizer = build.objective.optimizer(config.optimizer, config.train.steps)
    step = make_train_step(loss, optimizer, config.train.ema, config.train.accumulate, strategy)
    state, frozen = strategy.shapes((jax.eval_shape(lambda p: init_state(p, optimizer, 0), params), frozen))
    return step.lower(state, frozen, strategy.batch_shapes(_batch(model, batch_size)))


def _batch(model: DiffusionModel, size: int) -> PyTree:
    """The shapes of a training batch."""
    height, width, channels = model.shape
    channels = channels if model.codec.limit else 2 * channels  # pixels, or mean and standard deviation
    dtype = jnp.uint8 if model.codec.limit else jnp.bfloat16
    latent = jax.ShapeDtypeStruct((size, height, width, channels), dtype)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), model.conditioning.null)
    return {"latent": latent, "cond": cond}


def _published(config: ConfigDict) -> DiffusionModel:
    """A published model for fine-tuning, of which only the shapes are known."""
    published = MODELS[config.checkpoint]
    if _QUICK.value:
        published = quick.tiny_model(published)._replace(size=64)
    unet = UNet(**published.unet, dtype=build.model.DTYPES[config.dtype], remat=config.remat)
    autoencoder = AutoencoderKL(**published.autoencoder)
    null = {"text": jnp.zeros((TOKENS, unet.cross_attention_dim))}
    if unet.addition_embed_type == "text_time":
        pooled = unet.projection_class_embeddings_input_dim - TIME_IDS * unet.addition_time_embed_dim
        null |= {"text_embeds": jnp.zeros(pooled), "time_ids": jnp.zeros(TIME_IDS)}
    network, key = network_of(unet), jax.random.key(0)
    return DiffusionModel(
        network=network,
        params=jax.eval_shape(network.init, key),
        schedule=schedules.scaled_linear(),
        parameterization=parameterization.eps,
        codec=autoencoder_kl(autoencoder, jax.eval_shape(autoencoder.init, key, autoencoder.example_image())),
        conditioning=Conditioning(lambda: "", lambda records: {}, lambda prompts: {}, null),
        size=(published.size, published.size),
    )


if __name__ == "__main__":
    app.run(main)
