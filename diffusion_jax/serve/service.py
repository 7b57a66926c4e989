"""What all APIs of the server do: check a request, queue it, and follow it to its end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion_jax.serve import schema
from diffusion_jax.serve.engine import Ended, Engine, Event, Full, Job, PictureDone
from diffusion_jax.serve.metrics import Metrics
from diffusion_jax.serve.schema import Problem, Request
from diffusion_jax.serve.worker import Facts, Failed, Refused

Gone = Callable[[], Awaitable[bool]]
LOOK = 0.25  # seconds between two looks whether the client is still there


class QueuedRequest(NamedTuple):
    """A request in the queue."""

    request: Request
    job: Job


class Service:
    """An engine, and the requests that it takes.

    config: its sections sample and serve are used.
    """

    def __init__(self, engine: Engine, facts: Facts, config: ConfigDict):
        self.engine, self.facts, self.limits = engine, facts, config.serve
        self.sample = config.sample
        self.live_facts = facts.live or facts
        self.live_steps = min(config.serve.live_steps, self.live_facts.sampling["steps"])
        self.model = schema.of_model(facts, config.serve)
        self.live_model = schema.of_model(self.live_facts, config.serve, "LiveRequest")
        self.metrics = Metrics(engine)

    async def ask(self, values: Any, live: bool = False) -> QueuedRequest:
        """Check a request and queue it. Raises Problem.

        values: of the fields of `schema.Request`.
        live: whether it is a frame of the live canvas.
        """
        request = schema.checked(self.live_model if live else self.model, values)
        pictures = await asyncio.to_thread(schema.to_pictures, request, self.limits.max_pixels, live)
        if self.facts.needs_image and not pictures[0].shared.mask:
            raise Problem(400, "this model only inpaints: it needs an image and a mask", "mask")
        try:
            return QueuedRequest(request, self.engine.submit(pictures, request.previews))
        except Full as full:
            raise Problem(429, str(full), retry=full.seconds) from full

    async def follow(self, gone: Gone, queued: QueuedRequest) -> AsyncIterator[Event]:
        """Yield the events of a request until it ends. If the client is gone, cancel the request.

        gone: returns whether the client is gone.
        """
        job, start = queued.job, monotonic()
        try:
            while not await gone():
                try:
                    event = await asyncio.wait_for(job.events.get(), LOOK)
                except TimeoutError:
                    continue
                if isinstance(event, PictureDone):
                    self.metrics.pictures.inc()
                if event == Ended():
                    self.metrics.latency.labels(queued.request.task).observe(monotonic() - start)
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self.engine.cancel(job)

    async def png(self, queued: QueuedRequest, event: PictureDone) -> str:
        """A picture with its settings, PNG in base64."""
        return await asyncio.to_thread(schema.png, event.image, self.texts(queued, event.number))

    def texts(self, queued: QueuedRequest, number: int) -> dict[str, str]:
        """The settings of a picture, for its PNG text chunk."""
        picture = queued.job.pictures[number]
        facts = self.live_facts if picture.shared.live else self.facts
        return schema.texts(queued.request, picture, facts.origin)

    async def draw(self, gone: Gone, values: Any, live: bool = False) -> tuple[QueuedRequest, list[str]]:
        """The finished pictures of a request, PNG in base64. Raises Problem.

        gone: as in `follow`. values, live: as in `ask`.
        """
        queued = await self.ask(values, live)
        pictures = {}
        async for event in self.follow(gone, queued):
            if isinstance(event, PictureDone):
                pictures[event.number] = await self.png(queued, event)
            elif isinstance(event, Ended) and event.error:
                raise problem(event.error)
        if queued.job.left:
            raise Problem(400, "the client left")
        return queued, [pictures[number] for number in sorted(pictures)]


def problem(error: Refused | Failed) -> Problem:
    """The answer to a request that ended with this error."""
    return Problem(400 if isinstance(error, Refused) else 500, error.message)
