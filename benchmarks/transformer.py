"""DiT in full size with random weights, ours beside diffusers on torch.

    pip install -r requirements-peer.txt
    python -m benchmarks.transformer forward
    python -m benchmarks.transformer forward --size XL/2
    python -m benchmarks.transformer train --batch-size 4
    python -m benchmarks.transformer compile --size XL/2

Parts: `forward`, one call on latents of 32 x 32 x 4. `train`, forward, backward and AdamW. `compile`, seconds from the
traced program to the compiled one, of one call and of a step, with blocks compiled one by one and once for all
(`scan`). float32, or bfloat16 on both sides: of all weights in `forward`, in `train` of the large multiplications
(autocast of torch). The peer is `DiTTransformer2DModel`, eager; each pair takes turns (`turns.py`).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from benchmarks import quick, turns

SIZES = {"B/2": (12, 12, 64), "XL/2": (28, 16, 72), "tiny": (2, 2, 8)}  # layers, heads, channels of a head
PAIRS = {"float32": ("ours", "torch"), "scan": ("ours-scan", "torch"), "bfloat16": ("ours-bf16", "torch-bf16")}
RATE = 1e-4


def config(size: str) -> dict:
    """The config.json of a DiT for latents of 32 x 32."""
    layers, heads, channels = SIZES[size]
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": channels,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }


def our_program(part: str, size: str, batch_size: int, kind: str) -> tuple[Callable, tuple]:
    """The jitted function of the part and its arguments. Of `train`, its result replaces the first argument."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from diffusion_jax.interop.folders import transformer_of

    described = {"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-6, **config(size)}
    network, shapes = transformer_of(described, "config", scan=kind == "ours-scan")
    network = network.clone(dtype=jnp.bfloat16 if kind == "ours-bf16" else jnp.float32)
    stored = jnp.bfloat16 if kind == "ours-bf16" and part == "forward" else jnp.float32
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(scale=0.02, size=s.shape), stored), shapes)
    x, noise = jax.random.normal(jax.random.key(0), (2, batch_size, 32, 32, 4))
    t, cond = jnp.arange(batch_size), {"label": jnp.arange(batch_size)}
    if part == "forward":
        return jax.jit(network.apply), (params, x, t, cond)
    optimizer = optax.adamw(RATE)

    def update(state, x, t, cond):
        params, moments = state

        def loss(params):
            return jnp.mean(jnp.square(network.apply(params, x, t, cond)[..., :4] - noise))

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    return jax.jit(update, donate_argnums=0), ((params, optimizer.init(params)), x, t, cond)


def ours(part: str, size: str, batch_size: int, kind: str) -> Callable[[], object]:
    """A function that does the part once."""
    import jax

    program, (state, *rest) = our_program(part, size, batch_size, kind)

    def run() -> None:
        nonlocal state
        result = jax.block_until_ready(program(state, *rest))
        state = state if part == "forward" else result

    return run


def peer(part: str, size: str, batch_size: int, kind: str) -> Callable[[], object]:
    """The same with diffusers on torch."""
    import torch
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(**config(size))
    half = kind == "torch-bf16"
    x, noise = torch.randn(2, batch_size, 4, 32, 32)
    t = label = torch.arange(batch_size)
    if part == "forward":
        dtype = torch.bfloat16 if half else torch.float32
        network, x = network.to(dtype).eval(), x.to(dtype)
        return torch.no_grad()(lambda: network(x, timestep=t, class_labels=label).sample)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = network(x, timestep=t, class_labels=label).sample
        torch.nn.functional.mse_loss(out[:, :4].float(), noise).backward()
        optimizer.step()

    return step


def compile_times(size: str, batch_size: int) -> None:
    """Print a table of the seconds of compiling."""
    print("| program | blocks one by one | one for all |\n|---|---|---|")
    for part in ("forward", "train"):
        seconds = []
        for kind in ("ours", "ours-scan"):
            program, arguments = our_program(part, size, batch_size, kind)
            traced = program.lower(*arguments)
            start = time.perf_counter()
            traced.compile()
            seconds.append(f"{time.perf_counter() - start:.1f} s")
        print(f"| {part} | {' | '.join(seconds)} |", flush=True)


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("part", choices=("forward", "train", "compile"))
    parser.add_argument("--size", choices=SIZES, default="B/2")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7, help="measured runs of each side")
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.quick:
        flags.size, flags.turns = "tiny", 1
    if flags.serve:
        make = ours if flags.serve.startswith("ours") else peer
        return turns.serve(make(flags.part, flags.size, flags.batch_size, flags.serve))
    quick.note(flags.quick)
    print(f"{flags.part}, DiT-{flags.size}, batch {flags.batch_size}, {os.cpu_count()} CPUs")
    if flags.part == "compile":
        return compile_times(flags.size, flags.batch_size)
    print("| type | ours | torch | ours / torch |\n|---|---|---|---|")
    arguments = [flags.part, "--size", flags.size, "--batch-size", str(flags.batch_size)]
    for name in flags.pairs:
        measured = turns.measure(turns.commands("benchmarks.transformer", PAIRS[name], arguments), flags.turns)
        our_seconds, peer_seconds = (statistics.median(measured[side].seconds) for side in PAIRS[name])
        print(f"| {name} | {our_seconds:.3f} s | {peer_seconds:.3f} s | {our_seconds / peer_seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
