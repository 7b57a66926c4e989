"""FLUX.2 klein 4B in full size with random weights: a prompt to 512 x 512 pixels in 4 steps, ours beside diffusers.

    pip install -r requirements-peer.txt
    python -m benchmarks.klein --folder /tmp/klein

Text encoder, transformer and autoencoder are in memory in turns on both sides, in bfloat16: each is read from its files
for every picture, and the time is that of reading too. The first picture of ours, which compiles, is not measured. The
folder is written if it does not exist (16 GB); --quick has FOLDER-quick of its own. The sides take turns (`turns.py`),
and hold no weights while the other runs.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import quick, turns

PROMPT = "a photograph of an astronaut riding a horse"
GIB = 2**30


def ours(folder: Path, side: int, steps: int) -> Callable[[], object]:
    """A function that draws a picture. side: in pixels."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from diffusion_jax.interop import load_pipeline
    from diffusion_jax.pipelines.generate import decode
    from diffusion_jax.pipelines.published import from_published
    from diffusion_jax.pipelines.text_to_image import latents_of_text

    model = from_published(load_pipeline(folder, jnp.bfloat16, stored=True), (side, side), jnp.bfloat16)
    plan, keys = model.published_solvers["published"](steps, size=model.size), jax.random.split(jax.random.key(0), 1)

    def draw() -> np.ndarray:
        cond = model.conditioning.of_prompts([PROMPT])
        model.conditioning.release()
        return np.asarray(decode(model, latents_of_text(model, cond, keys, plan)))

    model.conditioning.release()
    draw()
    return draw


def theirs(folder: Path, side: int, steps: int) -> Callable[[], object]:
    """The same with diffusers."""
    import torch
    from diffusers import Flux2KleinPipeline

    def load(*left_out: str) -> Flux2KleinPipeline:
        pipeline = Flux2KleinPipeline.from_pretrained(
            folder, torch_dtype=torch.bfloat16, **dict.fromkeys(left_out, None)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def draw() -> object:
        texts = load("transformer", "vae")
        text = texts.encode_prompt(PROMPT)[0]
        del texts
        gc.collect()
        transformer = load("text_encoder", "tokenizer")
        generator, fields = torch.Generator().manual_seed(0), {"num_inference_steps": steps, "guidance_scale": 1.0}
        return transformer(prompt_embeds=text, height=side, width=side, generator=generator, **fields).images

    return draw


SIDES = {"ours": ours, "diffusers": theirs}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the pipeline; written where it does not exist")
    parser.add_argument("--turns", type=int, default=1, help="measured pictures of each side")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=512, help="of the picture, pixels")
    parser.add_argument("--sides", nargs="*", default=[*SIDES], choices=SIDES)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        if flags.serve == "ours":
            from diffusion_jax.compilation import configure

            configure()
        return turns.serve(SIDES[flags.serve](flags.folder, flags.side, flags.steps), warmups=0)

    quick.note(flags.quick)
    tiny = []
    if flags.quick:
        tiny, flags.folder, flags.turns, flags.steps, flags.side = ["--quick"], Path(f"{flags.folder}-quick"), 1, 2, 64
    if not flags.folder.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.random_klein", flags.folder, *tiny], check=True)
    arguments = ["--folder", str(flags.folder), "--steps", str(flags.steps), "--side", str(flags.side)]
    commands = turns.commands("benchmarks.klein", flags.sides, arguments)
    print(f"{flags.side} x {flags.side} pixels, {flags.steps} steps, {os.cpu_count()} CPUs")
    print("| side | a picture | peak memory |\n|---|---|---|", flush=True)
    for name, measured in turns.measure(commands, flags.turns, unmeasured=0).items():
        print(f"| {name} | {statistics.median(measured.seconds):.2f} s | {measured.peak / GIB:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
