"""One picture in 1, 2, 4 and 20 network calls, ours beside diffusers on torch.

    pip install -r requirements-peer.txt
    python -m benchmarks.latency --model weights/emoji

Both sides go from an embedded prompt to uint8 pixels, in float32: 1, 2 and 4 calls as a few-step student is sampled,
without guidance; 20 as its teacher, with DPM-Solver++(2M) and guidance 3, which evaluates the network for two pictures
at once. Time does not depend on the weights, so any model of the size will do. `start` is from the start of a process
to its first picture. The sides take turns (`turns.py`).
"""

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks import quick, turns

CALLS, GUIDED, SCALE = (1, 2, 4, 20), 20, 3.0
PROMPT = "a red apple, flat"


def our_picture(folder: str, size: int, calls: int) -> Callable[[], object]:
    """A function that makes the picture."""
    import jax

    from diffusion_jax.build.weights import load_model
    from diffusion_jax.core import solvers
    from diffusion_jax.data.transforms import to_uint8
    from diffusion_jax.pipelines import text_to_image

    model = load_model(folder, (size, size)).placed()
    cond, keys = model.conditioning.of_prompts([PROMPT]), jax.random.split(jax.random.key(0), 1)
    guided = calls == GUIDED
    plan = (solvers.dpmpp_2m if guided else solvers.consistency)(model.useful_schedule, calls)
    return lambda: to_uint8(np.asarray(text_to_image(model, cond, keys, plan, SCALE if guided else 1.0)))


def diffusers_picture(folder: str, size: int, calls: int) -> Callable[[], object]:
    """The same with diffusers' networks and schedulers."""
    import diffusers
    import torch

    from diffusion_jax.build import shipped

    place = shipped.find(folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(place / "unet", torch_dtype=torch.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(place / "vae", torch_dtype=torch.float32)
    guided = calls == GUIDED
    kind = diffusers.DPMSolverMultistepScheduler if guided else diffusers.LCMScheduler
    scheduler = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.set_timesteps(calls)
    batch, side = 1 + guided, size // 8
    text = torch.randn(batch, 24, unet.config.cross_attention_dim)
    pooled = torch.randn(batch, unet.config.projection_class_embeddings_input_dim)

    @torch.inference_mode()
    def run() -> np.ndarray:
        scheduler.set_timesteps(calls)
        x = torch.randn(1, 4, side, side)
        for t in scheduler.timesteps:
            out = unet(x.expand(batch, -1, -1, -1), t, text, class_labels=pooled).sample
            if guided:
                out = out[1:] + SCALE * (out[:1] - out[1:])
            x = scheduler.step(out, t, x).prev_sample
        image = vae.decode(x / vae.config.scaling_factor).sample
        return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()

    return run


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--model", default="weights/emoji")
    parser.add_argument("--size", type=int, default=128, help="height and width of the picture")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, _, calls = options.serve.partition(":")
        make = our_picture if side == "ours" else diffusers_picture
        turns.serve(make(options.model, options.size, int(calls)), warmups=1)
        return
    quick.note(options.quick)
    calls, count = ((1,), 2) if options.quick else (CALLS, options.turns)
    size = 64 if options.quick else options.size
    print(f"{size} x {size} pixels, {count} turns\n")
    print(
        "| network calls | ours p50, ms | p95 | diffusers p50, ms | p95 | ratio of p50 | start, ours, s | diffusers |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number in calls:
        sides = [f"ours:{number}", f"diffusers:{number}"]
        side_flags = ["--model", options.model, "--size", str(size)]
        measured = turns.measure(turns.commands("benchmarks.latency", sides, side_flags), count)
        milliseconds = [1000 * np.percentile(measured[side].seconds, (50, 95)) for side in sides]
        cells = [f"{value:.0f}" for pair in milliseconds for value in pair]
        ratio = milliseconds[1][0] / milliseconds[0][0]
        starts = [f"{measured[side].start:.1f}" for side in sides]
        print(f"| {number} | {' | '.join(cells)} | {ratio:.2f} | {' | '.join(starts)} |", flush=True)


if __name__ == "__main__":
    main()
