"""Load a model to serve, and the facts about it that the server needs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import build, parallel, paths
from diffusion_jax.build import weights
from diffusion_jax.build.sections import side
from diffusion_jax.compilation import configure
from diffusion_jax.core.solvers import SPACINGS
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.serve import sizes, suggestions
from diffusion_jax.serve.drawing import INVERTIBLE, Picture, Shared, usable_solvers, usable_tasks

SAMPLING = ("solver", "spacing", "steps", "guidance")
CURVE = 101  # points of the schedule's curves
SIZES = 16  # the most further sizes


class Loaded(NamedTuple):
    """A model to serve.

    origin: where its weights come from.
    live: the model that draws the frames of the live canvas; None for this one.
    """

    config: ConfigDict
    model: DiffusionModel
    origin: str
    live: "Loaded | None" = None


class Facts(NamedTuple):
    """The facts about a model that the server needs.

    size: height and width of its own images, pixels.
    sizes: of all images that it draws: its own, and those of serve.sizes.
    needs_image: whether it only inpaints.
    references: how many reference pictures a prompt may refer to.
    tasks: that it can do; see `schema.Request`.
    guided: whether the guidance scale can be chosen.
    sampling: solver, spacing, steps and guidance, unless a request has others.
    words: learned words that prompts may use, and how many vectors each has.
    batch_size, live_size: images drawn at once, also for a frame of the live canvas.
    curves: the noise schedule: t, alpha, sigma.
    vocabulary, examples: see `suggestions`.
    live: the same of the model of the live canvas; None if it is this one.
    """

    name: str
    origin: str
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    needs_image: bool
    references: int
    tasks: tuple[str, ...]
    guided: bool
    solvers: tuple[str, ...]
    spacings: tuple[str, ...]
    sampling: dict[str, str | int | float]
    words: dict[str, int]
    batch_size: int
    live_size: int
    curves: dict[str, list[float]]
    vocabulary: dict[str, tuple[str, ...]]
    examples: tuple[str, ...]
    live: "Facts | None" = None


def load(config: ConfigDict, workdir: Path) -> Loaded:
    """The model of a config with its weights, as --mode=sample finds it.

    Raises ValueError and OSError for what cannot be loaded.
    """
    configure()
    if not build.model.has_denoiser(config):
        raise ValueError("this config has no denoiser, so there is nothing to draw with; name another --config")
    config = weights.resolved(config, workdir)
    model = build.model.diffusion_model(config, (config.sample.height, config.sample.width))
    loaded = Loaded(config, *weights.load(config, workdir, model))
    return loaded._replace(live=_student(loaded, workdir))


def _student(loaded: Loaded, workdir: Path) -> Loaded | None:
    """The model of serve.live_weights, if it was distilled from this one. It is served by the same section."""
    folder = loaded.config.serve.live_weights
    config = weights.load_config(folder) if folder else None
    if config is None or paths.at(config.get("teacher", "")) not in (paths.at(loaded.origin), workdir):
        return None
    config.serve = loaded.config.serve
    condition = weights.shared_condition(config, loaded.config, loaded.model)
    return Loaded(config, weights.load_model(folder, loaded.model.size, loaded.model, condition), folder)


def facts(loaded: Loaded) -> Facts:
    """The facts about a loaded model. Raises ValueError for sizes that it cannot draw."""
    config, model = loaded.config, loaded.model
    schedule, serve = model.schedule, config.serve
    weights, comma, step = loaded.origin.partition(",")
    folder = paths.at(weights).parent if comma else paths.at(weights)  # RUN/checkpoints, step 20, averaged
    t = np.linspace(schedule.t_min, schedule.t_max, CURVE)
    solvers = usable_solvers(config, model)
    curves = {"t": t, "alpha": schedule(t).alpha, "sigma": schedule(t).sigma}
    return Facts(
        name=config.name,
        origin=f"{folder.name}{comma}{step}",
        size=model.size,
        sizes=(model.size, *_further_sizes(model, serve.sizes)),
        needs_image=bool(model.network.known_channels),
        references=model.references.most,
        tasks=usable_tasks(model, solvers),
        guided=not build.sampling.has_guidance(config, model) and not config.sample.cfg_pp,
        solvers=solvers,
        spacings=("", *model.published_times, *SPACINGS),
        sampling={name: config.sample[name] for name in SAMPLING},
        words=dict(model.conditioning.words),
        batch_size=parallel.divisible(serve.batch_size),
        live_size=parallel.divisible(1),
        curves={name: np.asarray(values).tolist() for name, values in curves.items()},
        vocabulary=suggestions.vocabulary(config, model.conditioning.words),
        examples=suggestions.examples(loaded.origin),
        live=loaded.live and facts(loaded.live),
    )


def _further_sizes(model: DiffusionModel, texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The sizes of serve.sizes. Raises ValueError for one that this model cannot draw, and for too many."""
    if len(texts) > SIZES:
        raise ValueError(f"config.serve.sizes: expected at most {SIZES}: each has its own programs; got {len(texts)}")
    try:
        further = tuple(map(sizes.parsed, texts))
        for size in further:
            if must_be := next(filter(None, map(side, size)), ""):
                raise ValueError(f"height and width must be {must_be}, got {sizes.written(size)}")
            model.resized(size)
    except ValueError as error:
        raise ValueError(f"config.serve.sizes: {error}") from error
    return further


def to_warm(model_facts: Facts, prompt: str) -> list[Picture]:
    """Pictures whose programs serve every request of the model's own size: from a prompt, an image, an image and a
    mask, or a reference picture; for a batch and for a live frame; with guidance and without; and the other tasks.
    """
    image, mask = np.zeros((*model_facts.size, 3), np.uint8), np.ones((*model_facts.size, 1), bool)
    shared = Shared(
        "generate", model_facts.size, model_facts.sampling["solver"], model_facts.sampling["spacing"], steps=2
    )

    def warming(negative_prompt: str = "", scale: float = model_facts.sampling["guidance"], **kind) -> Picture:
        picture = Picture(shared._replace(guided=scale != 1, **kind), prompt, negative_prompt, scale, seed=0)
        return picture._replace(
            image=image if picture.shared.image else None,
            mask=mask if picture.shared.mask else None,
            references=(image,) * picture.shared.references,
            other_prompt=prompt,
        )

    inputs = [{"image": True, "mask": True}]
    if not model_facts.needs_image:
        inputs = [{}, {"image": True}, *inputs]
    kinds = []
    for live, kind_facts in {False: model_facts, True: model_facts.live or model_facts}.items():
        method = {name: kind_facts.sampling[name] for name in ("solver", "spacing")}
        of_kind = [*inputs, {"references": 1}] if kind_facts.references and not live else inputs
        for scale in dict.fromkeys(
            (kind_facts.sampling["guidance"], 1.0) if kind_facts.guided else (kind_facts.sampling["guidance"],)
        ):
            kinds += [warming(scale=scale, live=live, **method, **given) for given in of_kind]
    kinds.append(warming(prompt, **inputs[0]))
    others = (
        warming(task="morph"),
        warming(task="noise", image=True),
        warming(solver=INVERTIBLE, task="style", image=True),
    )
    return kinds + [other for other in others if other.shared.task in model_facts.tasks]
