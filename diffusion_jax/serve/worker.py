"""The process that owns the devices: it loads a model, compiles its programs, and draws one batch after another.

It is a process of its own, so that whatever ends it, such as a lack of memory, does not end the server.
"""

import collections
import contextlib
import functools
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from time import monotonic
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import build, parallel, paths
from diffusion_jax.build import weights
from diffusion_jax.build.fields import side
from diffusion_jax.compilation import configure
from diffusion_jax.core.solvers import SPACINGS
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.messages import one_line
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.pipelines.generate import Callback, decode
from diffusion_jax.serve import sizes
from diffusion_jax.serve.drawing import (
    INVERTIBLE,
    Artist,
    Picture,
    Shared,
    filled,
    usable_solvers,
    usable_tasks,
)

Show = Callable[["Step"], bool]  # shows a step, and returns whether to stop
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event that one program was compiled
SHARE = 4  # a preview is shown after this many times the time that it takes
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
    tasks: that it can do; see `schema.Request`.
    guided: whether the guidance scale can be chosen.
    sampling: solver, spacing, steps and guidance, unless a request has others.
    words: learned words that prompts may use, and how many vectors each has.
    batch_size, live_size: images drawn at once, also for a frame of the live canvas.
    curves: the noise schedule: t, alpha, sigma.
    live: the same of the model of the live canvas; None if it is this one.
    """

    name: str
    origin: str
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    needs_image: bool
    tasks: tuple[str, ...]
    guided: bool
    solvers: tuple[str, ...]
    spacings: tuple[str, ...]
    sampling: dict[str, str | int | float]
    words: dict[str, int]
    batch_size: int
    live_size: int
    curves: dict[str, list[float]]
    live: "Facts | None" = None


class Batch(NamedTuple):
    """Pictures to draw, all with the same `shared`.

    previews: none, some or all: whether to show what the network expects after a step.
    """

    number: int
    pictures: list[Picture]
    previews: str


class Cancel(NamedTuple):
    """Nobody waits for this batch any more."""

    number: int


class Step(NamedTuple):
    """A step of a batch is done.

    number: of the batch.
    previews: by the picture's place in the batch, what the network expects it to become; or None.
    """

    number: int
    done: int
    total: int
    previews: dict[int, np.ndarray] | None


class Refused(NamedTuple):
    """The picture cannot be drawn as it was asked for.

    field: of `schema.Request` that is wrong, or "".
    """

    message: str
    field: str = ""


class Failed(NamedTuple):
    """The picture should have been drawn, and was not."""

    message: str


Outcome = np.ndarray | Refused | Failed  # of a picture; images are uint8 (H, W, 3)
NOT_FINITE = Failed("the model's output is not finite: its weights may be damaged, or its type may need more range")
HELD_BACK = Refused("the model's safety checker holds this picture back: change the prompt or the seed")


class Drawn(NamedTuple):
    """A batch is done. number: of the batch. outcomes: one for each picture."""

    number: int
    outcomes: list[Outcome]


class Compiled(NamedTuple):
    """How many programs this process has compiled, and how many are still to be compiled before the first request."""

    programs: int
    left: int


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
    return Loaded(config, weights.load_model(folder, loaded.model.size, teacher=loaded.model), folder)


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
        tasks=usable_tasks(model, solvers),
        guided=not build.sampling.has_guidance(config, model) and not config.sample.cfg_pp,
        solvers=solvers,
        spacings=("", *model.published_times, *SPACINGS),
        sampling={name: config.sample[name] for name in SAMPLING},
        words=dict(model.conditioning.words),
        batch_size=parallel.divisible(serve.batch_size),
        live_size=parallel.divisible(1),
        curves={name: np.asarray(values).tolist() for name, values in curves.items()},
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
    mask; for a batch and for a live frame; with guidance and without; and the other tasks.
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
            other_prompt=prompt,
        )

    inputs = [{"image": True, "mask": True}]
    if not model_facts.needs_image:
        inputs = [{}, {"image": True}, *inputs]
    kinds = []
    for live, kind_facts in {False: model_facts, True: model_facts.live or model_facts}.items():
        method = {name: kind_facts.sampling[name] for name in ("solver", "spacing")}
        for scale in dict.fromkeys(
            (kind_facts.sampling["guidance"], 1.0) if kind_facts.guided else (kind_facts.sampling["guidance"],)
        ):
            kinds += [warming(scale=scale, live=live, **method, **inputs_of_kind) for inputs_of_kind in inputs]
    kinds.append(warming(prompt, **inputs[0]))
    others = (
        warming(task="morph"),
        warming(task="noise", image=True),
        warming(solver=INVERTIBLE, task="style", image=True),
    )
    return kinds + [other for other in others if other.shared.task in model_facts.tasks]


def main(connection: Connection, load: Callable[[], Loaded]) -> None:
    """Answer batches until the other end is closed. First send Facts, or Refused if there is no model to draw with.

    load: runs in this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    programs = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: programs.update([event]))
    try:
        loaded = load()
        model_facts, artists = facts(loaded), _artists(loaded)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        connection.send(Refused(one_line(error)))
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # until the server is gone
        connection.send(model_facts)
        _answer(
            connection,
            artists,
            model_facts,
            to_warm(model_facts, next(iter(loaded.config.sample.prompts), "")),
            programs,
        )


def _artists(loaded: Loaded) -> dict[bool, Artist]:
    """By whether a frame of the live canvas is to be drawn."""
    artist = Artist(loaded.config, loaded.model)
    return {False: artist, True: Artist(loaded.live.config, loaded.live.model) if loaded.live else artist}


class _Link:
    """The worker's end of the pipe, shared by threads.

    own, others: batches of the model's own size, and of other sizes; None when the server is gone.
    cancelled: numbers of batches that nobody waits for.
    idle: whether no batch of the own size is being drawn.
    """

    def __init__(self, connection: Connection, size: tuple[int, int]):
        self.connection, self.size, self.lock = connection, size, threading.Lock()
        self.own: queue.Queue[Batch | None] = queue.Queue()
        self.others: queue.Queue[Batch | None] = queue.Queue()
        self.cancelled: set[int] = set()
        self.idle = threading.Event()
        self.idle.set()

    def read(self) -> None:
        """Sort what the server sends, until it is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self.connection.recv()
                if isinstance(message, Cancel):
                    self.cancelled.add(message.number)
                else:
                    is_own = message.pictures[0].shared.size == self.size
                    (self.own if is_own else self.others).put(message)
        self.own.put(None)
        self.others.put(None)

    def send(self, message: Step | Drawn | Compiled) -> None:
        """Send a message to the server."""
        with self.lock:
            self.connection.send(message)

    def show(self, step: Step) -> bool:
        """Send a step, and return whether to stop."""
        self.send(step)
        return step.number in self.cancelled

    def show_when_idle(self, step: Step) -> bool:
        """As `show`, but first wait for the batch of the own size."""
        self.idle.wait()
        return self.show(step)


def _answer(
    connection: Connection,
    artists: Mapping[bool, Artist],
    model_facts: Facts,
    warming: list[Picture],
    programs: Mapping[str, int],
) -> None:
    """Draw what the server sends. Other sizes have a thread of their own, so that nobody waits while one compiles."""
    link = _Link(connection, model_facts.size)
    draw = functools.partial(_draw, artists, model_facts)
    threading.Thread(target=link.read, daemon=True).start()
    threading.Thread(target=_answer_others, args=(link, draw), daemon=True).start()
    while True:
        if warming and link.own.empty():
            draw(Batch(0, [warming.pop(0)], "all"), lambda step: False)
        else:
            batch = link.own.get()
            if batch is None:
                return
            link.idle.clear()
            link.send(Drawn(batch.number, draw(batch, link.show)))
            link.idle.set()
        link.send(Compiled(programs[COMPILED], len(warming)))


def _answer_others(link: _Link, draw: Callable[[Batch, Show], list[Outcome]]) -> None:
    """Draw the batches of other sizes: between two steps, one of the own size has its turn."""
    try:
        with contextlib.suppress(OSError):  # the server is gone
            while batch := link.others.get():
                link.send(Drawn(batch.number, draw(batch, link.show_when_idle)))
    finally:
        link.own.put(None)  # the worker does not go on without this thread


def _draw(artists: Mapping[bool, Artist], model_facts: Facts, batch: Batch, show: Show) -> list[Outcome]:
    """Draw a batch, those of one shape of condition at a time."""
    live = batch.pictures[0].shared.live
    artist, size = artists[live], model_facts.live_size if live else model_facts.batch_size
    outcomes: dict[int, Outcome] = {}
    groups = collections.defaultdict(list)
    for i, picture in enumerate(batch.pictures):
        try:
            groups[str(artist.shapes(picture))].append(i)
        except ValueError as error:
            outcomes[i] = Refused(one_line(error), "prompt")
    for places in groups.values():
        pictures = filled([batch.pictures[i] for i in places], size)
        images = _images(artist, pictures, functools.partial(_after_step, artist, batch, places, [0.0], show))
        outcomes |= dict(zip(places, images, strict=False))
    return [outcomes[i] for i in range(len(batch.pictures))]


def _images(artist: Artist, pictures: list[Picture], callback: Callback) -> list[Outcome]:
    """The image of each picture, or why there is none."""
    try:
        images = np.asarray(artist.draw(pictures, callback))
    except ValueError as error:
        return [Refused(one_line(error))] * len(pictures)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return [Failed("not enough memory for images of this size")] * len(pictures)
        logging.exception("a batch failed")
        return [Failed("the device failed; the server's log has the error")] * len(pictures)
    except Exception:  # whatever it is, the next batch may be drawn
        logging.exception("a batch failed")
        return [Failed("an error in the server; its log has more")] * len(pictures)
    pixels, finite = to_uint8(np.nan_to_num(images)), np.isfinite(images).all(axis=(1, 2, 3))
    results = zip(pixels, artist.model.held_back(pixels), finite, strict=True)
    return [(HELD_BACK if held_back else image) if good else NOT_FINITE for image, held_back, good in results]


def _after_step(
    artist: Artist, batch: Batch, places: list[int], due: list[float], show: Show, done: int, x0: jax.Array
) -> bool:
    """Show a step of the pictures at these places of the batch.

    due: when the next preview is, changed here.
    """
    jax.block_until_ready(x0)
    shared, start, previews = batch.pictures[0].shared, monotonic(), None
    total = artist.rows(shared)
    if batch.previews == "all" or (batch.previews == "some" and start >= due[0] and done < total):
        images = to_uint8(np.asarray(decode(artist.of_size(shared.size), x0)))
        images[artist.model.held_back(images)] = 0
        previews = dict(zip(places, images, strict=False))
        due[0] = monotonic() + SHARE * (monotonic() - start)
    return show(Step(batch.number, done, total, previews))
