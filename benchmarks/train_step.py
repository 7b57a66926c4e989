"""Images a second in training, ours beside the peer's: the U-Net of DDPM for CIFAR-10 (35.7 million parameters).

    pip install -r requirements-peer.txt
    python benchmarks/train_step.py --batch-size 16 --steps 8

A step is forward, backward and AdamW in float32, on one random batch. Each library runs in a process of its own, which
builds and warms up; then the two take turns, so that whatever else the machine does falls on both. While one has its
turn, of an unmeasured step and a measured one, the other is stopped: threads that wait by spinning slow nobody. The
peer is diffusers on torch, eager, with the threads that torch chooses.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
TINY = MODEL | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
RATE = 2e-4


def ours(model: dict, batch_size: int) -> Callable[[], float]:
    """A function that takes one step of this project and returns the loss."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
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


def serve(side: str, model: dict, batch_size: int) -> None:
    """Warm up, say so, then answer each line on stdin with the seconds of one step."""
    step = SIDES[side](model, batch_size)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        step()
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure(arguments: list[str], steps: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turns."""
    servers = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--serve", side, *arguments]
        servers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if servers[side].stdout.readline() != "ready\n":
            raise SystemExit(f"{side}: did not start; its message is above")
        servers[side].send_signal(signal.SIGSTOP)
    seconds = {side: [] for side in SIDES}
    for _ in range(steps):
        for side, server in servers.items():
            server.send_signal(signal.SIGCONT)
            server.stdin.write("\n")
            server.stdin.flush()
            seconds[side].append(float(server.stdout.readline()))
            server.send_signal(signal.SIGSTOP)
    for server in servers.values():
        server.send_signal(signal.SIGCONT)
        server.stdin.close()
        server.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each side")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network: shows that the script works, no measurement"
    )
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        return serve(flags.serve, TINY if flags.quick else MODEL, flags.batch_size)

    arguments = ["--batch-size", str(flags.batch_size), *(["--quick"] if flags.quick else [])]
    seconds = measure(arguments, flags.steps)
    print(
        f"batch {flags.batch_size}, {os.cpu_count()} CPUs" + (", tiny network: no measurement" if flags.quick else "")
    )
    median = {side: statistics.median(times) for side, times in seconds.items()}
    for side, times in seconds.items():
        each = " ".join(f"{s:.3f}" for s in times)
        print(f"{side}: {flags.batch_size / median[side]:.2f} images/s, median {median[side]:.3f} s of {each}")
    print(f"ours / peer: {median['peer'] / median['ours']:.3f} times the images a second")


if __name__ == "__main__":
    main()
