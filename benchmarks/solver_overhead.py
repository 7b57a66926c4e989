"""What a solver itself costs a step, ours beside diffusers' schedulers: the network costs nothing.

    pip install -r requirements-peer.txt
    python -m benchmarks.solver_overhead

Latents of 64 x 64 x 4, batch 8, 50 steps, on the CPU. Ours is `sampling.sample` as users call it, rows in chunks of 10;
the peer is a loop over `scheduler.step`, as its pipelines have it. Both are warm; runs take turns and the median
counts.
"""

import argparse
import statistics
import time

import diffusers
import jax
import jax.numpy as jnp
import torch

from diffusion_jax.core import process, sampling, schedules, solvers

PAIRS = {
    "ddim": (solvers.ddim, lambda: diffusers.DDIMScheduler(clip_sample=False)),
    "ddpm": (solvers.ddpm, lambda: diffusers.DDPMScheduler(clip_sample=False)),
    "euler": (solvers.euler, diffusers.EulerDiscreteScheduler),
    "dpmpp_2m": (solvers.dpmpp_2m, diffusers.DPMSolverMultistepScheduler),
    "unipc": (solvers.unipc, diffusers.UniPCMultistepScheduler),
}
BATCH, SIDE, CHANNELS = 8, 64, 4


def free(params, x, t, cond):
    """A network without a cost."""
    return x


def ours(solver, steps: int):
    """A function that takes all steps."""
    plan = solver(schedules.linear(), steps)
    keys = jax.random.split(jax.random.key(0), BATCH)
    x = sampling.initial_noise(keys, (SIDE, SIDE, CHANNELS), plan.start)
    denoise = sampling.denoiser(free, jnp.zeros(()), process.from_eps)
    return lambda: sampling.sample(denoise, plan, x, keys).block_until_ready()


def peer(scheduler, steps: int):
    """The same with a scheduler."""
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)

    def run():
        scheduler.set_timesteps(steps)
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(scheduler.scale_model_input(sample, t), t, sample).prev_sample
        return sample

    return torch.no_grad()(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    flags = parser.parse_args()
    print(f"microseconds a step: batch {BATCH}, {SIDE} x {SIDE} x {CHANNELS}, {flags.steps} steps, {flags.runs} runs")
    print("| solver | ours | diffusers | diffusers / ours |\n|---|---|---|---|")
    for name, (solver, scheduler) in PAIRS.items():
        sides = {"ours": ours(solver, flags.steps), "peer": peer(scheduler(), flags.steps)}
        seconds = {side: [] for side in sides}
        for _ in range(flags.runs + 2):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
        micro = {side: 1e6 * statistics.median(times[2:]) / flags.steps for side, times in seconds.items()}
        print(f"| {name} | {micro['ours']:.0f} | {micro['peer']:.0f} | {micro['peer'] / micro['ours']:.1f} |")


if __name__ == "__main__":
    main()
