"""The same noise and prompts by the student of the demo and by the demo itself: writes docs/fast.png.

python -m benchmarks.fast_strip
"""

from benchmarks import quick
from configs import emoji, latent_cfg
from diffusion_jax import pictures
from diffusion_jax.app import sample
from diffusion_jax.build.weights import load_model

PROMPTS = emoji.SCENES[:8]
ROWS = {  # -> preset, steps
    "student, 1 call": ("fast", 1),
    "student, 2 calls": ("fast", 2),
    "student, 4 calls": ("fast", 4),
    "demo, 4 steps": ("full", 4),
    "demo, 20 steps": ("full", 20),
}


def main() -> None:
    small = quick.parser(__doc__).parse_args().quick
    quick.note(small)
    prompts, images, captions = PROMPTS[:2] if small else PROMPTS, [], []
    for caption, (preset, steps) in dict(list(ROWS.items())[:1]).items() if small else ROWS.items():
        config = latent_cfg.get_config(preset)
        config.sample.update(steps=steps, batch_size=len(prompts))
        model, seeds = load_model(config.weights), range(len(prompts))
        images += sample.generate_pictures(config, model, prompts, seeds, config.sample.guidance)
        captions += [caption] * len(prompts)
    pictures.save(quick.picture("fast.png", small), pictures.grid(images, len(prompts), captions), {})


if __name__ == "__main__":
    main()
