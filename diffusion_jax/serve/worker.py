"""The process that owns the devices: it loads a model, compiles its programs, and draws one batch after another.

It is a process of its own, so that whatever ends it, such as a lack of memory, does not end the server.
"""

import collections
import contextlib
import functools
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from time import monotonic
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.messages import one_line
from diffusion_jax.pipelines.generate import Callback, decode
from diffusion_jax.serve.drawing import Artist, Picture, Shared, filled
from diffusion_jax.serve.loading import Facts, Loaded, facts, to_warm

Show = Callable[["Step"], bool]  # shows a step, and returns whether to stop
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event that one program was compiled
SAVED = "/jax/compilation_cache/compile_time_saved_sec"  # and of the seconds that its cache saved
SHARE = 4  # a preview is shown after this many times the time that it takes


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
    """How many programs this process has compiled, and how many are still to be compiled before the first request.

    seconds: that a further kind of picture takes the first time, without a cache of compiled programs; 0 if unknown.
    """

    programs: int
    left: int
    seconds: float = 0.0


def main(connection: Connection, load: Callable[[], Loaded]) -> None:
    """Answer batches until the other end is closed. First send Facts, or Refused if there is no model to draw with.

    load: runs in this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    durations = collections.defaultdict(list)
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **_: durations[event].append(duration))
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
            durations,
        )


def _artists(loaded: Loaded) -> dict[bool, Artist]:
    """By whether a frame of the live canvas is to be drawn."""
    artist = Artist(loaded.config, loaded.model)
    return {False: artist, True: Artist(loaded.live.config, loaded.live.model) if loaded.live else artist}


class _Link:
    """The worker's end of the pipe, shared by threads.

    is_own: whether pictures belong to `own`.
    own, others: batches of the model's own size, and of other sizes; None when the server is gone.
    cancelled: numbers of batches that nobody waits for.
    idle: whether no batch of the own size is being drawn.
    """

    def __init__(self, connection: Connection, is_own: Callable[[Shared], bool]):
        self.connection, self.is_own, self.lock = connection, is_own, threading.Lock()
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
                    (self.own if self.is_own(message.pictures[0].shared) else self.others).put(message)
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
    durations: Mapping[str, list[float]],
) -> None:
    """Draw what the server sends. Other sizes have a thread of their own, so that nobody waits while one compiles. In
    turns they have not: two threads would hold two networks on the device.

    durations: seconds of JAX's events, which are added while it runs.
    """
    in_turns = any(artist.in_turns for artist in artists.values())
    link = _Link(connection, lambda shared: in_turns or shared.is_prepared(model_facts.size))
    draw = functools.partial(_draw, artists, model_facts)
    threading.Thread(target=link.read, daemon=True).start()
    threading.Thread(target=_answer_others, args=(link, draw), daemon=True).start()
    seconds = 0.0
    while True:
        if warming and link.own.empty():
            start, saved = monotonic(), sum(durations[SAVED])
            draw(Batch(0, [warming.pop(0)], "all"), lambda step: False)
            seconds = seconds or monotonic() - start + sum(durations[SAVED]) - saved
        else:
            batch = link.own.get()
            if batch is None:
                return
            link.idle.clear()
            link.send(Drawn(batch.number, draw(batch, link.show)))
            link.idle.set()
        link.send(Compiled(len(durations[COMPILED]), len(warming), seconds))


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
