"""The same noise and prompts by several solvers at 5, 10, 20 and 50 steps: writes docs/solver_strip.png.

python -m benchmarks.solver_strip
"""

import jax
import numpy as np

from benchmarks import quick
from diffusion_jax import pictures
from diffusion_jax.build.weights import load_model
from diffusion_jax.core import solvers
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.pipelines import text_to_image

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
PROMPTS = ("a red apple", "a purple fish")
WEIGHTS = "weights/emoji"
GUIDANCE, SEED = 3.0, 1


def main() -> None:
    small = quick.parser(__doc__).parse_args().quick
    quick.note(small)
    names, steps = (["ddim", "heun"], STEPS[:1]) if small else (SOLVERS, STEPS)
    model = load_model(WEIGHTS)
    cond = model.conditioning.of_prompts(PROMPTS)
    keys = jax.vmap(jax.random.key)(np.full(len(PROMPTS), SEED, np.uint32))
    images, captions = [], []
    for name in names:
        plans = [SOLVERS[name](model.schedule, n) for n in steps]
        by_plan = [to_uint8(text_to_image(model, cond, keys, plan, GUIDANCE)) for plan in plans]
        images += [np.asarray(pictures_of_plan[i]) for i in range(len(PROMPTS)) for pictures_of_plan in by_plan]
        captions += [f"{name}, {n} steps" for _ in PROMPTS for n in steps]
    columns = len(PROMPTS) * len(steps)
    sheet = pictures.grid(images, columns, captions)
    about = {"prompts": "; ".join(PROMPTS), "seed": str(SEED), "guidance": str(GUIDANCE), "weights": WEIGHTS}
    pictures.save(quick.picture("solver_strip.png", small), sheet, about)


if __name__ == "__main__":
    main()
