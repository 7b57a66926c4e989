"""Stable Diffusion 1.5 in full size with random weights, ours beside diffusers on torch.

    pip install -r requirements-peer.txt
    python -m benchmarks.stable_diffusion unet --folder /tmp/sd15

Parts: `unet`, one guided step: batch 2, latents of 64 x 64 x 4, 77 x 768 of text. `vae`, one latent to 512 x 512
pixels. `image`, a prompt to 512 x 512 pixels with DPM-Solver++(2M) and guidance 7.5. `start`, from the start of a
process to the end of its first step. All in float32, or both sides in bfloat16 for "torch-bf16". The folder is written
if it does not exist (4.3 GB, a minute); --quick has FOLDER-quick of its own. The peer is diffusers; each of its sides
takes turns with ours (`turns.py`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import quick, turns

PROMPT, GUIDANCE = "a photograph of an astronaut riding a horse", 7.5
PEERS = {  # sides beside ours of each part
    "unet": ("torch", "torch-compiled", "torch-bf16"),
    "vae": ("torch", "torch-compiled", "torch-bf16"),
    "image": ("torch",),
}
GIB = 2**30


def ours(part: str, folder: Path, steps: int, kind: str = "ours") -> Callable[[], object]:
    """A function that does the part once. steps: of `image`. kind: "ours" or "ours-bf16"."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax.interop import load_autoencoder, load_unet

    dtype = jnp.bfloat16 if kind == "ours-bf16" else jnp.float32
    if part == "image":
        run = our_image(folder)
        run(1)  # the program serves any number of steps
        return lambda: run(steps)
    if part == "vae":
        vae, params = load_autoencoder(folder / "vae", dtype)
        side = vae.sample_size // 8
        z = jax.random.normal(jax.random.key(0), (1, side, side, 4))
        decode = jax.jit(lambda params, z: vae.clone(dtype=dtype).apply(params, z, method="decode"))
        return lambda: decode(params, z).block_until_ready()
    unet, params = load_unet(folder / "unet", dtype)
    x = jax.random.normal(jax.random.key(0), (2, unet.sample_size, unet.sample_size, 4))
    cond = {"text": jax.random.normal(jax.random.key(1), (2, 77, unet.cross_attention_dim))}
    apply = jax.jit(unet.clone(dtype=dtype).apply)
    return lambda: apply(params, x, jnp.full((2,), 500.0), cond).block_until_ready()


def our_image(folder: Path, laps: Callable[[str], None] = lambda name: None) -> Callable[..., object]:
    """A function of the number of steps that generates the image. laps: records the time of loading weights."""
    import jax

    from diffusion_jax.core import solvers
    from diffusion_jax.interop import load_pipeline
    from diffusion_jax.pipelines import generate
    from diffusion_jax.pipelines.published import from_published

    laps("import")
    published = load_pipeline(folder)
    jax.block_until_ready([part.params for part in (published.denoiser, published.autoencoder)])
    laps("load")
    model = from_published(published)
    keys = jax.random.split(jax.random.key(0), 1)

    def run(steps: int, decode: bool = True):
        plan = solvers.dpmpp_2m(published.schedule, steps)
        noise = generate.noise(model, keys, plan.initial)
        x0 = generate.solve(model, noise, model.conditioning.of_prompts([PROMPT]), keys, plan, GUIDANCE)
        return jax.block_until_ready(generate.decode(model, x0) if decode else x0)

    return run


def peer(part: str, folder: Path, steps: int, kind: str = "torch") -> Callable[[], object]:
    """The same with diffusers. kind: "torch", "torch-compiled" or "torch-bf16"."""
    import diffusers
    import torch

    dtype = torch.bfloat16 if kind == "torch-bf16" else torch.float32
    finish = torch.compile if kind == "torch-compiled" else lambda function: function
    if part == "image":
        run = peer_image(folder)
        run(1)
        return lambda: run(steps)
    if part == "vae":
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        side = vae.config.sample_size // 8
        z = torch.randn(1, 4, side, side, dtype=dtype)
        decode = finish(lambda z: vae.decode(z).sample)
        return torch.no_grad()(lambda: decode(z))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    x = torch.randn(2, 4, unet.config.sample_size, unet.config.sample_size, dtype=dtype)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=dtype)
    apply, t = finish(unet), torch.full((2,), 500.0)
    return torch.no_grad()(lambda: apply(x, t, text).sample)


def peer_image(folder: Path, laps: Callable[[str], None] = lambda name: None) -> Callable[..., object]:
    """As `our_image`."""
    import diffusers
    import torch

    laps("import")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    laps("load")

    def run(steps: int, decode: bool = True):
        output = "pt" if decode else "latent"
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type=output, generator=generator
        ).images

    return run


def first_step(side: str, folder: Path) -> None:
    """The work of a process of the part `start`. Prints the seconds of its laps."""
    seconds, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    run = (our_image if side == "ours" else peer_image)(folder, lap)
    run(1, decode=False)
    lap("first")
    run(1, decode=False)
    lap("step")
    print(json.dumps(seconds | {"peak": turns.peak()}))


def start(arguments: list[str], count: int) -> None:
    """Time whole processes: ours with an empty compilation cache, ours with it filled, the peer."""
    print("| to the end of the first step | all | weights | a warm step | the rest | peak |\n|---|---|---|---|---|---|")
    cache = tempfile.mkdtemp()
    for name, side in [("ours, cold", "ours"), *[("ours, warm", "ours")] * count, *[("torch", "torch")] * count]:
        command = [sys.executable, "-m", "benchmarks.stable_diffusion", "start", "--serve", side, *arguments]
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        )
        laps = json.loads(done.stdout.splitlines()[-1])
        elapsed = time.perf_counter() - begin - laps["step"]  # the second step is reported separately
        seconds = elapsed, laps["load"], laps["step"], elapsed - laps["load"] - laps["step"]
        print(f"| {name} | {' | '.join(f'{s:.1f} s' for s in seconds)} | {laps['peak'] / GIB:.2f} GiB |", flush=True)
    shutil.rmtree(cache)


def compare(part: str, sides: Sequence[str], arguments: list[str], count: int) -> None:
    """Time ours beside each of the peer's sides."""
    print("| beside | ours | peer | ours / peer | peak of ours | of the peer |\n|---|---|---|---|---|---|")
    for side in sides:
        pair = "ours-bf16" if side == "torch-bf16" else "ours", side
        commands = turns.commands("benchmarks.stable_diffusion", pair, [part, *arguments])
        measured = turns.measure(commands, count, unmeasured=0)
        our_seconds, peer_seconds = (statistics.median(measured[name].seconds) for name in pair)
        peaks = " | ".join(f"{measured[name].peak / GIB:.2f} GiB" for name in pair)
        print(
            f"| {side} | {our_seconds:.2f} s | {peer_seconds:.2f} s | {our_seconds / peer_seconds:.2f} | {peaks} |",
            flush=True,
        )


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("part", choices=[*PEERS, "start"])
    parser.add_argument("--folder", type=Path, required=True, help="of the pipeline; written where it does not exist")
    parser.add_argument("--turns", type=int, default=3, help="measured runs of each side")
    parser.add_argument("--steps", type=int, default=20, help="of `image`")
    parser.add_argument("--sides", nargs="*", help="of the peer; all by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve and flags.serve.startswith("ours"):
        from diffusion_jax.compilation import configure

        configure()
    if flags.serve and flags.part == "start":
        return first_step(flags.serve, flags.folder)
    if flags.serve:
        make = ours if flags.serve.startswith("ours") else peer
        run = make(flags.part, flags.folder, flags.steps, flags.serve)
        return turns.serve(run, warmups=0 if flags.part == "image" else 2)

    quick.note(flags.quick)
    tiny = []
    if flags.quick:
        tiny, flags.folder, flags.turns, flags.steps = ["--quick"], Path(f"{flags.folder}-quick"), 1, 2
    if not flags.folder.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.random_pipeline", flags.folder, *tiny], check=True)
    print(f"{flags.part}, {os.cpu_count()} CPUs")
    arguments = ["--folder", str(flags.folder), "--steps", str(flags.steps)]
    if flags.part == "start":
        return start(arguments, flags.turns)
    sides = flags.sides or PEERS[flags.part]
    compare(flags.part, sides[:1] if flags.quick else sides, arguments, flags.turns)


if __name__ == "__main__":
    main()
