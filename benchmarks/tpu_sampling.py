"""Check by the TPU compiler whether text to image fits a TPU, and estimate its cost. No TPU is needed.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_sampling --model=sd15 --topology=v5e:1x1 --batch=1

Compiles the whole way from tokens to pixels as one program: text encoders, 20 steps of the guided U-Net, the
autoencoder's decoder, at the model's image size, weights and multiplications in bfloat16. Images are split over
the chips, weights are on every chip. Prints bytes for each chip, FLOPs for each image, and two estimates of the time
from tokens to pixels: that of the FLOPs at the given utilisation, and the compiler's own. Nothing is run.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import families, quick, tpu
from diffusion_jax.compilation import planned_for
from diffusion_jax.core import parameterization, schedules, solvers
from diffusion_jax.core.denoiser import denoiser
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.sampling import initial_noise, sample
from diffusion_jax.models.applied import Applied
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.unet import UNet

STEPS, GUIDANCE, TOKENS = 20, 7.5, 77


class Model(NamedTuple):
    """unet, texts, autoencoder: fields of `UNet`, `ClipTextEncoder` and `AutoencoderKL`. size: pixels a side."""

    unet: dict
    texts: tuple[dict, ...]
    size: int
    autoencoder: dict = families.AUTOENCODER_SIZE


MODELS = {
    "sd15": Model(families.UNET, (families.CLIP_L,), 512),
    "sdxl": Model(families.SDXL_UNET, (families.CLIP_L, families.CLIP_BIG_G), 1024),
}


class Networks(NamedTuple):
    """The networks of a model, or their variables."""

    texts: tuple
    unet: object
    autoencoder: object


@planned_for("tpu")
def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--topology", nargs="+", default=["v5e:1x1"], help="slices, such as v5e:2x4 or v6e:1x1")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images a chip")
    parser.add_argument("--attention", nargs="+", default=["xla"], help="implementations of the U-Net's attention")
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed share of the chips' peak")
    parser.add_argument("--check", action="store_true", help="count the FLOPs of a step in another way too")
    args = parser.parse_args()
    quick.note(args.quick)
    model = MODELS[args.model]
    if args.quick:
        model = quick.tiny_model(model)._replace(size=64)
    params = variables(networks(model, "xla"))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.model}, {model.size} x {model.size} pixels, {count / 1e6:.0f}M parameters", flush=True)
    once = flops(around, model, params)
    if args.check:
        print(
            f"FLOPs of a guided step of the U-Net by itself: {flops(one_step, model, params) / 1e12:.3f} T", flush=True
        )
    columns = "slice", "images a chip", "attention", "arguments", "temporary", "total", "FLOPs a step", "FLOPs an image"
    columns += f"estimate at {args.utilisation:.0%} of peak", "as the compiler expects", "compiled in"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for topology in args.topology:
        for batch in args.batch:
            for attention in args.attention:
                report(model, params, attention, topology, batch, once, args.utilisation)


def report(
    model: Model, params: Networks, attention: str, topology: str, batch: int, once: float, utilisation: float
) -> None:
    """Compile for a slice and print a row. once: FLOPs of what is outside the loop, an image."""
    start = time.perf_counter()
    head = f"| {topology} | {batch} | {attention}"
    try:
        cost = tpu.cost(compiled(model, params, networks(model, attention), topology, batch))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{head} | does not fit: {str(error).splitlines()[0]}", flush=True)
        return
    chip = tpu.chip(topology)
    # the compiler counts the body of the scan once
    step = cost.flops / batch - once
    an_image = once + STEPS * step
    seconds = batch * an_image / (chip.flops * utilisation), cost.cycles / tpu.clock(topology)
    print(
        f"{head} | {cost.arguments / 1e9:.2f} GB | {cost.temporary / 1e9:.2f} GB | "
        f"{cost.total / 1e9:.2f} of {chip.memory / 1e9:.0f} GB | {step / 1e12:.3f} T | {an_image / 1e12:.2f} T | "
        f"{seconds[0]:.2f} s | {seconds[1]:.2f} s | {time.perf_counter() - start:.0f} s |",
        flush=True,
    )


def networks(model: Model, attention: str) -> Networks:
    """The model's networks, multiplying in bfloat16."""
    shared = {"dtype": jnp.bfloat16, "attention_implementation": attention}
    return Networks(
        tuple(ClipTextEncoder(**text, dtype=jnp.bfloat16) for text in model.texts),
        UNet(**model.unet, **shared),
        # 4096 and 16384 pixels in one head: one softmax over all of them would be the largest array by far
        AutoencoderKL(**model.autoencoder, dtype=jnp.bfloat16, attention_implementation="blocks"),
    )


def variables(modules: Networks) -> Networks:
    """The shapes of all variables, in bfloat16."""

    def shapes(module, *inputs):
        initial = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), initial)

    return Networks(
        tuple(shapes(text, *text.example_inputs()) for text in modules.texts),
        shapes(modules.unet, *modules.unet.example_inputs()),
        shapes(modules.autoencoder, modules.autoencoder.example_image()),
    )


def condition(model: Model, modules: Networks, params: Networks, ids: jax.Array) -> dict[str, jax.Array]:
    """The condition of the U-Net for tokens (B, 77)."""
    features = [text.apply(variables, ids) for text, variables in zip(modules.texts, params.texts, strict=True)]
    if len(features) == 1:
        return {"text": features[0].last_hidden_state}
    return {
        "text": jnp.concatenate([feature.penultimate for feature in features], axis=-1),
        "text_embeds": features[-1].pooled,
        "time_ids": jnp.tile(jnp.float32([model.size, model.size, 0, 0, model.size, model.size]), (len(ids), 1)),
    }


def pixels(modules: Networks, params: Networks, x0: jax.Array) -> jax.Array:
    """Images (B, size, size, 3), uint8, of latents."""
    autoencoder = modules.autoencoder
    image = autoencoder.apply(params.autoencoder, x0 / autoencoder.scaling_factor, method="decode")
    return jnp.round(127.5 * jnp.clip(image + 1, 0, 2)).astype(jnp.uint8)


def text_to_image(model: Model, modules: Networks, params: Networks, ids: jax.Array, seeds: jax.Array) -> jax.Array:
    """Tokens (B, 2, 77) of a prompt and a negative prompt, and seeds (B,) -> images."""
    keys = jax.vmap(jax.random.key)(seeds)
    cond, negative = (condition(model, modules, params, ids[:, i]) for i in (0, 1))

    denoise = guided(denoiser(Applied(modules.unet), params.unet, parameterization.eps), Guidance(GUIDANCE), negative)
    plan = solvers.dpmpp_2m(schedules.scaled_linear(), STEPS)
    x = initial_noise(keys, (model.size // 8, model.size // 8, 4), jax.tree.map(jnp.float32, plan.start))
    return pixels(modules, params, sample(denoise, plan, x, keys, cond, chunk=None))


def compiled(model: Model, params: Networks, modules: Networks, topology: str, batch: int):
    """`text_to_image` for every chip of a slice, `batch` images on each."""
    devices = np.array(tpu.devices(topology))
    mesh = Mesh(devices, ("data",))
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    total = batch * len(devices)
    run = jax.jit(
        lambda params, ids, seeds: text_to_image(model, modules, params, ids, seeds),
        in_shardings=(replicated, split, split),
        out_shardings=split,
    )
    ids = jax.ShapeDtypeStruct((total, 2, TOKENS), jnp.int32)
    return run.lower(params, ids, jax.ShapeDtypeStruct((total,), jnp.uint32)).compile()


def around(model: Model, modules: Networks, params: Networks, ids: jax.Array) -> tuple:
    """The part outside the loop, for one image: text encoders and decoder."""
    cond = [condition(model, modules, params, ids[:, i]) for i in (0, 1)]
    return cond, pixels(modules, params, jnp.zeros((1, model.size // 8, model.size // 8, 4)))


def one_step(model: Model, modules: Networks, params: Networks, ids: jax.Array) -> jax.Array:
    """The U-Net for one image, with its prompt and without."""
    cond = jax.eval_shape(lambda: condition(model, modules, params, ids[0]))
    cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cond)
    x = jnp.zeros((2, model.size // 8, model.size // 8, 4))
    return modules.unet.apply(params.unet, x, jnp.zeros(2), cond)


def flops(part: Callable, model: Model, params: Networks) -> float:
    """FLOPs of `around` or `one_step`, before compilation."""
    modules = networks(model, "xla")
    modules = modules._replace(autoencoder=modules.autoencoder.clone(attention_implementation="xla"))
    ids = jax.ShapeDtypeStruct((1, 2, TOKENS), jnp.int32)
    run = jax.jit(lambda params, ids: part(model, modules, params, ids))
    return run.lower(params, ids).cost_analysis()["flops"]


if __name__ == "__main__":
    main()
