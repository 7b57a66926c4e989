"""Images a second in training, compared with diffusers: the U-Net of DDPM for CIFAR-10 (35.7 million parameters).

    pip install -r requirements-peer.txt
    python -m benchmarks.train_step --batch-size 16 --steps 8

A step is forward, backward and AdamW in float32, on one random batch. The peer is diffusers on torch, eager, with the
threads that torch chooses. The two take turns (`turns.py`), each of an unmeasured step and a measured one.
"""

import argparse
import os
import statistics
from collections.abc import Callable

from benchmarks import quick, turns

MODEL = {  # the config.json of google/ddpm-cifar10-32
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
TINY = quick.tiny_unet(MODEL, attention_head_dim=None)
RATE = 2e-4


def ours(model: dict, batch_size: int) -> Callable[[], float]:
    """A function that takes one step of this project and returns the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from diffusion_jax.models.unet import UNet

    unet = UNet(**model, mid_block_type="UNetMidBlock2D")
    optimizer = optax.adamw(RATE)
    x, noise = jax.random.normal(jax.random.key(0), (2, batch_size, 32, 32, 3))
    t = jnp.arange(batch_size)

    def update(state):
        params, moments = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(unet.apply(p, x, t) - noise)))(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = jax.jit(unet.init)(jax.random.key(0), *unet.example_inputs())
    state = params, optimizer.init(params)
    update = jax.jit(update, donate_argnums=0)

    def step() -> float:
        nonlocal state
        state, loss = update(state)
        return float(loss)

    return step


def peer(model: dict, batch_size: int) -> Callable[[], float]:
    """The same with diffusers on torch."""
    import torch
    from diffusers import UNet2DModel

    unet = UNet2DModel(**model)
    optimizer = torch.optim.AdamW(unet.parameters(), RATE)
    x, noise = torch.randn(2, batch_size, 3, 32, 32)
    t = torch.arange(batch_size)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(unet(x, t).sample, noise)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


SIDES = {"ours": ours, "peer": peer}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each side")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        return turns.serve(SIDES[flags.serve](TINY if flags.quick else MODEL, flags.batch_size))

    quick.note(flags.quick)
    arguments = ["--batch-size", str(flags.batch_size), *(["--quick"] if flags.quick else [])]
    commands = turns.commands("benchmarks.train_step", SIDES, arguments)
    sides = turns.measure(commands, 1 if flags.quick else flags.steps)
    seconds = {name: side.seconds for name, side in sides.items()}
    print(f"batch {flags.batch_size}, {os.cpu_count()} CPUs")
    median = {side: statistics.median(times) for side, times in seconds.items()}
    for side, times in seconds.items():
        each = " ".join(f"{s:.3f}" for s in times)
        print(f"{side}: {flags.batch_size / median[side]:.2f} images/s, median {median[side]:.3f} s of {each}")
    print(f"ours / peer: {median['peer'] / median['ours']:.3f} times the images a second")


if __name__ == "__main__":
    main()
