"""The overhead of a solver for each step, compared with diffusers' schedulers: the network costs nothing.

    pip install -r requirements-peer.txt
    python -m benchmarks.solver_overhead

Latents of 64 x 64 x 4, batch 8, 50 steps, on the CPU. Ours is `sampling.sample` as users call it, rows in chunks of 10;
the peer is diffusers, a loop over `scheduler.step` as in its pipelines. Both are warm and take turns (`turns.py`).
The result is the median.
"""

import argparse
import statistics
from collections.abc import Callable

from benchmarks import quick, turns

PAIRS = {  # our solver -> diffusers' scheduler and its options
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
BATCH, SIDE, CHANNELS = 8, 64, 4


def free(params, x, t, cond):
    """A network without a cost."""
    return x


def ours(name: str, steps: int) -> Callable[[], object]:
    """A function that takes all steps."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax.core import parameterization, sampling, schedules, solvers
    from diffusion_jax.core.denoiser import denoiser

    plan = getattr(solvers, name)(schedules.linear(), steps)
    keys = jax.random.split(jax.random.key(0), BATCH)
    x = sampling.initial_noise(keys, (SIDE, SIDE, CHANNELS), plan.start)
    denoise = denoiser(free, jnp.zeros(()), parameterization.eps)
    return lambda: sampling.sample(denoise, plan, x, keys).block_until_ready()


def peer(name: str, steps: int) -> Callable[[], object]:
    """The same with a scheduler."""
    import diffusers
    import torch

    kind, options = PAIRS[name]
    scheduler = getattr(diffusers, kind)(**options)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)

    def run():
        scheduler.set_timesteps(steps)
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(scheduler.scale_model_input(sample, t), t, sample).prev_sample
        return sample

    return torch.no_grad()(run)


SIDES = {"ours": ours, "peer": peer}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--solver", choices=PAIRS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        return turns.serve(SIDES[flags.serve](flags.solver, flags.steps))

    quick.note(flags.quick)
    names = list(PAIRS)
    if flags.quick:
        names, flags.steps, flags.runs = names[:1], 2, 1
    print(f"microseconds a step: batch {BATCH}, {SIDE} x {SIDE} x {CHANNELS}, {flags.steps} steps, {flags.runs} runs")
    print("| solver | ours | diffusers | diffusers / ours |\n|---|---|---|---|")
    for name in names:
        arguments = ["--solver", name, "--steps", str(flags.steps)]
        sides = turns.measure(turns.commands("benchmarks.solver_overhead", SIDES, arguments), flags.runs)
        ours, peer = (1e6 * statistics.median(sides[side].seconds) / flags.steps for side in SIDES)
        print(f"| {name} | {ours:.0f} | {peer:.0f} | {peer / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
