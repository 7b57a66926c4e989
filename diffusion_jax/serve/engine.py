"""The queue of requests, and the process that draws them.

Everything here runs in the server's event loop. The worker is another process, `worker.main`, at the other end of a
pipe. If it dies, it is started again, and what it was drawing is drawn again, once.
"""

import asyncio
import bisect
import contextlib
import math
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np
from absl import logging

from diffusion_jax.serve import worker
from diffusion_jax.serve.drawing import Picture, Shared
from diffusion_jax.serve.loading import Facts, Loaded
from diffusion_jax.serve.worker import Batch, Cancel, Compiled, Drawn, Failed, Refused, Step

TRIES = 2  # a request is drawn again if the worker dies, but not if it dies again
STARTS = 3  # a worker that dies so often before it has loaded its model is not started again
PENDING = 32  # events that a slow client has not read; further steps are not reported to it
GONE = Failed("the process that draws cannot be started; the server's log has more")
CANCELLED = Refused("cancelled")
MEMORY = 0.8  # weight of the old mean time of a batch when a new one is measured


class Queued(NamedTuple):
    """The request waits. position: how many are before it."""

    position: int


class Preparing(NamedTuple):
    """Programs for the request's size are compiled before its first step.

    size: height and width that are drawn, pixels.
    seconds: that this takes, about; 0 if unknown.
    """

    size: tuple[int, int]
    seconds: float


class Progress(NamedTuple):
    """A step of some of its pictures is done.

    done, total: steps.
    previews: by the number of the picture, what the network expects it to become.
    """

    done: int
    total: int
    previews: dict[int, np.ndarray]


class PictureDone(NamedTuple):
    """A picture is done. number: its place in the request."""

    number: int
    image: np.ndarray


class Ended(NamedTuple):
    """The request is done: all of its pictures are done, or an error says why not."""

    error: Refused | Failed | None = None


Event = Queued | Preparing | Progress | PictureDone | Ended


class Full(Exception):
    """The queue is full. seconds: when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full: try again in {seconds} seconds")
        self.seconds = seconds


class Job:
    """A request: its pictures and its events.

    pictures: to draw.
    previews: none, some or all; see `worker.Batch`.
    client: who asks, or None.
    turn: its place in the queue; the requests of one client have different turns.
    """

    def __init__(self, pictures: Sequence[Picture], previews: str, client: str | None = None, turn: int = 0):
        self.pictures, self.previews, self.client, self.turn = pictures, previews, client, turn
        self.shared = pictures[0].shared
        self.waiting = list(range(len(pictures)))  # numbers of the pictures that are in no batch yet
        self.left = len(pictures)
        self.tries = 0
        self.position = -1
        self.ended = False
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(self, event: Event) -> None:
        """Add an event for the client."""
        if isinstance(event, Progress) and self.events.qsize() >= PENDING:
            return
        self.ended = self.ended or isinstance(event, Ended)
        self.events.put_nowait(event)


class Lane:
    """What the worker draws at once: one lane for pictures whose programs are compiled at the start, one for others.

    running: (job, number of its picture) of the batch that is being drawn.
    number: of that batch.
    started: when.
    """

    def __init__(self):
        self.running: list[tuple[Job, int]] = []
        self.number, self.started = 0, 0.0


class Engine:
    """A worker and the requests that wait for it.

    load: gives the worker its model; pickled.
    size: requests that may wait, half of them of one client.
    """

    def __init__(self, load: Callable[[], Loaded], size: int):
        self.load, self.size = load, size
        self.queue: list[Job] = []
        self.lanes = {True: Lane(), False: Lane()}  # by `Shared.is_prepared`, mostly: of the model's own size
        self.number = 0  # of the last batch
        self.turn = 0  # of the last request that was begun
        self.seconds = 1.0  # a batch of the own size takes, on average
        self.compiled = Compiled(0, 1)
        self.prepared: set[Shared] = set()  # kinds of pictures of other sizes whose programs are compiled
        self.restarts = self.starts = 0
        self.facts: Facts | None = None  # None while the worker loads its model
        self.stopped = False

    def start(self) -> Facts:
        """Start the worker and wait until it has loaded its model. Raises ValueError if it cannot."""
        self._spawn()
        try:
            facts = self.connection.recv()
        except EOFError as error:
            raise ValueError("the process that loads the model ended; is there enough memory for it?") from error
        if isinstance(facts, Refused):
            raise ValueError(facts.message)
        self.facts, self.starts = facts, 0
        return facts

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=worker.main, args=(worker_end, self.load), daemon=True)
        self.process.start()
        worker_end.close()
        self.starts += 1

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer requests within this context, in the running event loop."""
        self.loop = asyncio.get_running_loop()
        self._listen()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """End the worker."""
        self.stopped = True
        self.process.terminate()
        self.process.join()

    def _listen(self) -> None:
        """Pass the worker's messages, and its end, to the event loop."""
        connection, loop = self.connection, self.loop

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                try:
                    while True:
                        loop.call_soon_threadsafe(self._take, connection.recv())
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(self._restart)

        threading.Thread(target=listen, daemon=True).start()

    @property
    def state(self) -> str:
        """starting, warming, ready, or failed: the worker cannot be started."""
        if self.facts is None:
            return "failed" if self.starts >= STARTS else "starting"
        return "warming" if self.compiled.left else "ready"

    @property
    def pictures_waiting(self) -> int:
        """Pictures that are not drawn yet."""
        return sum(job.left for job in {*self.queue, *(job for job, _ in self._running)} if not job.ended)

    @property
    def _running(self) -> list[tuple[Job, int]]:
        return [entry for lane in self.lanes.values() for entry in lane.running]

    def seconds_before(self, job: Job) -> float:
        """How long the pictures before a waiting request take, about."""
        first = self._ordered()[: max(job.position, 0)]
        running = {other for other, _ in self._running if not other.ended}
        pictures = sum(other.left for other in {*first, *running} - {job})
        return math.ceil(pictures / self.facts.batch_size) * self.seconds if self.facts else 0.0

    def check_room(self, client: str | None = None) -> None:
        """Raise Full if as many requests wait as may, of all clients or of this one."""
        own = sum(job.client == client for job in self.queue)
        if len(self.queue) >= self.size or (client is not None and own >= max(1, self.size // 2)):
            batches = math.ceil(self.pictures_waiting / self.facts.batch_size) if self.facts else 1
            raise Full(max(1, math.ceil(batches * self.seconds)))

    def submit(self, pictures: Sequence[Picture], previews: str = "none", client: str | None = None) -> Job:
        """Add a request to the queue: clients take turns, each in the order of arrival. Raises Full as `check_room`."""
        self.check_room(client)
        own = [job for job in self.queue if job.client == client]
        turn = max([self.turn, *(job.turn + 1 for job in own)])
        job = Job(pictures, previews, client, turn)
        if self.state == "failed":
            job.tell(Ended(GONE))
            return job
        bisect.insort(self.queue, job, key=lambda other: other.turn)
        self._next()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a request. A batch that nobody waits for any more stops after its current step."""
        if job.ended:
            return
        job.tell(Ended(CANCELLED))
        if job in self.queue:
            self.queue.remove(job)
        for lane in self.lanes.values():
            if any(other is job for other, _ in lane.running) and all(other.ended for other, _ in lane.running):
                self._send(Cancel(lane.number))
        self._tell_positions()

    def _send(self, message: Batch | Cancel) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed by `_listen`
            self.connection.send(message)

    def _next(self) -> None:
        """Send the worker its next batches, if it waits for any."""
        if self.facts:
            for is_own, lane in self.lanes.items():
                waiting = [job for job in self.queue if self._has_own_size(job) == is_own]
                if waiting and not lane.running:
                    self._start(lane, waiting)
        self._tell_positions()

    def _has_own_size(self, job: Job) -> bool:
        return self.facts is None or job.shared.is_prepared(self.facts.size)

    def _start(self, lane: Lane, waiting: Sequence[Job]) -> None:
        """Send the worker a batch: pictures of the first request, and of others like it."""
        first = waiting[0]
        shared = first.pictures[first.waiting[0]].shared
        capacity = 1 if shared.live else self.facts.batch_size
        for job in waiting:
            while job.waiting and job.pictures[job.waiting[0]].shared == shared and len(lane.running) < capacity:
                lane.running.append((job, job.waiting.pop(0)))
            if not job.waiting:
                self.queue.remove(job)
        self.turn = max(self.turn, first.turn)
        if not self._has_own_size(first) and _kind(shared) not in self.prepared:
            for job in dict.fromkeys(job for job, _ in lane.running):
                job.tell(Preparing(shared.size, self.compiled.seconds))
        self.number += 1
        lane.number, lane.started = self.number, monotonic()
        requested = {job.previews for job, _ in lane.running}
        previews = next(name for name in ("all", "some", "none") if name in requested)
        self._send(Batch(lane.number, [job.pictures[i] for job, i in lane.running], previews))

    def _ordered(self) -> list[Job]:
        """Requests of other sizes come after those of the own size."""
        return sorted(self.queue, key=self._has_own_size, reverse=True)

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._ordered()):
            if job.position != position and job.left == len(job.pictures):
                job.position = position
                job.tell(Queued(position))

    def _take(self, message: Facts | Compiled | Step | Drawn | Refused) -> None:
        match message:
            case Facts():
                self.facts, self.starts = message, 0
                self._next()
            case Compiled():
                self.compiled = message
            case Step():
                self._tell_step(message)
            case Drawn():
                self._take_images(message)
            case Refused():
                logging.error("the model cannot be loaded again: %s", message.message)

    def _tell_step(self, step: Step) -> None:
        running, previews = self._lane(step.number).running, step.previews or {}
        for job in dict.fromkeys(job for job, _ in running if not job.ended):
            job_previews = {
                number: previews[i] for i, (other, number) in enumerate(running) if other is job and i in previews
            }
            job.tell(Progress(step.done, step.total, job_previews if job.previews != "none" else {}))

    def _lane(self, number: int) -> Lane:
        """The lane of a batch."""
        return next(lane for lane in self.lanes.values() if lane.number == number)

    def _take_images(self, result: Drawn) -> None:
        lane = self._lane(result.number)
        if lane is self.lanes[True]:
            self.seconds = MEMORY * self.seconds + (1 - MEMORY) * (monotonic() - lane.started)
        for (job, number), outcome in zip(lane.running, result.outcomes, strict=True):
            if job.ended:
                continue
            if not isinstance(outcome, np.ndarray):
                if job in self.queue:
                    self.queue.remove(job)
                job.tell(Ended(outcome))
                continue
            job.left -= 1
            job.tell(PictureDone(number, outcome))
            if not job.left:
                job.tell(Ended())
        if any(isinstance(outcome, np.ndarray) for outcome in result.outcomes):
            first, number = lane.running[0]
            self.prepared.add(_kind(first.pictures[number].shared))
        lane.running = []
        self._next()

    def _restart(self) -> None:
        """Start the worker again after its death. What it was drawing comes first."""
        if self.stopped:
            return
        self.process.join()
        logging.error("the process that draws ended with status %s", self.process.exitcode)
        self.facts = None
        running = self._running
        interrupted = dict.fromkeys(job for job, _ in running if not job.ended)
        for job in interrupted:
            job.waiting = sorted([*job.waiting, *(number for other, number in running if other is job)])
            job.tries, job.position = job.tries + 1, -1
            if job.tries == TRIES:
                job.tell(Ended(Failed("the process that draws ended twice while it drew this")))
        retried = [job for job in interrupted if not job.ended]
        self.queue = retried + [job for job in self.queue if job not in interrupted]
        self.lanes = {True: Lane(), False: Lane()}
        self.prepared.clear()
        if self.starts >= STARTS:
            for job in self.queue:
                job.tell(Ended(GONE))
            self.queue.clear()
            return
        self.restarts += 1
        self._spawn()
        self._listen()
        self._tell_positions()


def _kind(shared: Shared) -> Shared:
    """What one compiled program draws: the plan is an input of it."""
    return shared._replace(solver="", spacing="", steps=0, strength=1.0)
