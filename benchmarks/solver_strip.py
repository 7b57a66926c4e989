"""The same noise and prompts by several solvers at 5, 10, 20 and 50 steps: writes docs/solver_strip.png.

python -m benchmarks.solver_strip
"""

from pathlib import Path

import jax
import numpy as np

from configs import latent_cfg
from diffusion_jax.app import build, pictures, weights
from diffusion_jax.core import solvers
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.pipelines import text_to_image

ROOT = Path(__file__).parent.parent
SOLVERS = {
    "ddim": solvers.ddim,
    "heun": solvers.heun,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_3m": solvers.dpmpp_3m,
    "unipc": solvers.unipc,
    "deis": solvers.deis,
    "ddpm": solvers.ddpm,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
}
STEPS = (5, 10, 20, 50)
PROMPTS = ("grinning cat", "rocket")
GUIDANCE, SEED = 3.0, 1


def main() -> None:
    config = latent_cfg.get_config()
    config.weights = str(ROOT / config.weights)
    model, _ = weights.load(config, Path("no run of its own"), build.model(config))
    cond = model.conditioning.of_prompts(PROMPTS)
    keys = jax.vmap(jax.random.key)(np.full(len(PROMPTS), SEED, np.uint32))
    images, captions = [], []
    for name, solver in SOLVERS.items():
        made = [to_uint8(text_to_image(model, cond, keys, solver(model.schedule, n), GUIDANCE)) for n in STEPS]
        images += [np.asarray(made[j][i]) for i in range(len(PROMPTS)) for j in range(len(STEPS))]
        captions += [f"{name}, {n} steps" for _ in PROMPTS for n in STEPS]
    columns = len(PROMPTS) * len(STEPS)
    sheet = pictures.grid(images, columns, captions)
    about = {"prompts": "; ".join(PROMPTS), "seed": str(SEED), "guidance": str(GUIDANCE), "weights": config.weights}
    pictures.save(ROOT / "docs" / "solver_strip.png", sheet, about)


if __name__ == "__main__":
    main()
