"""What all APIs of the server do: check a request, queue it, and follow it to its end."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax.serve import schema
from diffusion_jax.serve.engine import Ended, Engine, Event, Full, Job, PictureDone, Progress
from diffusion_jax.serve.loading import Facts
from diffusion_jax.serve.metrics import Metrics
from diffusion_jax.serve.saving import Album
from diffusion_jax.serve.schema import Problem, Request
from diffusion_jax.serve.sizes import Frame
from diffusion_jax.serve.worker import Failed, Refused

Gone = Callable[[], Awaitable[bool]]
LOOK = 0.25  # seconds between two looks whether the client is still there


class QueuedRequest(NamedTuple):
    """A request in the queue. frame: its size, and that which is drawn for it."""

    request: Request
    job: Job
    frame: Frame

    @property
    def notes(self) -> list[str]:
        """What is said in the answer."""
        return [self.frame.about] if self.frame.is_resized else []


class Service:
    """An engine, and the requests that it takes.

    config: its sections sample and serve are used.
    album: gets every picture, too, unless it is None.
    """

    def __init__(self, engine: Engine, facts: Facts, config: ConfigDict, album: Album | None = None):
        self.engine, self.facts, self.limits = engine, facts, config.serve
        self.sample = config.sample
        self.live_facts = facts.live or facts
        self.live_steps = min(config.serve.live_steps, self.live_facts.sampling["steps"])
        self.model = schema.of_model(facts, config.serve)
        self.live_model = schema.of_model(self.live_facts, config.serve, "LiveRequest")
        self.metrics = Metrics(engine)
        self.album = album

    async def ask(self, client: str, values: Any, live: bool = False) -> QueuedRequest:
        """Check a request and queue it. Raises Problem.

        client: who asks; see `guard.client_of`.
        values: of the fields of `schema.Request`.
        live: whether it is a frame of the live canvas.
        """
        facts = self.live_facts if live else self.facts
        if not facts.references and isinstance(values, dict) and values.get("references"):
            raise Problem(400, "this model reads no reference pictures: leave them out", "references")
        request = schema.checked(self.live_model if live else self.model, values)
        try:
            self.engine.check_room(client)  # before pictures are decoded
            frame = await asyncio.to_thread(schema.to_frame, request, self.facts.sizes, self.limits)
            pictures = await asyncio.to_thread(schema.to_pictures, request, frame, live)
            if self.facts.needs_image and not pictures[0].shared.mask:
                raise Problem(400, "this model only inpaints: it needs an image and a mask", "mask")
            # a request that waits keeps only what its answer needs; an empty image says that there was one
            frame = frame if frame.is_resized and frame.mask is not None else frame._replace(image=None, mask=None)
            frame = frame._replace(references=())
            request = request.model_copy(update={"image": request.image and "", "mask": None, "references": []})
            return QueuedRequest(request, self.engine.submit(pictures, request.previews, client), frame)
        except Full as full:
            raise Problem(429, str(full), retry=full.seconds) from full

    async def follow(self, gone: Gone, queued: QueuedRequest) -> AsyncIterator[Event]:
        """Yield the events of a request until it ends, images in the size that was asked for. If the client is gone,
        cancel the request.

        gone: returns whether the client is gone.
        """
        job, start = queued.job, monotonic()
        try:
            while not await gone():
                try:
                    event = await asyncio.wait_for(job.events.get(), LOOK)
                except TimeoutError:
                    continue
                if queued.frame.is_resized:
                    event = await asyncio.to_thread(_resized, event, queued.frame)
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
        picture, texts = queued.job.pictures[event.number], self.texts(queued, event.number)
        content = await asyncio.to_thread(schema.png, event.image, texts)
        if queued.request.task in ("generate", "style") and not picture.shared.live:
            await self._save(texts, content)
        return content

    async def animation(self, queued: QueuedRequest, images: Sequence[np.ndarray]) -> dict[str, str]:
        """The pictures of a morph as an animated PNG with its settings and as a GIF, both in base64."""
        texts = self.texts(queued, 0)
        animated = await asyncio.to_thread(schema.animation, images, texts)
        await self._save(texts, animated)
        return {"image": animated, "gif": await asyncio.to_thread(schema.gif, images)}

    async def _save(self, texts: dict[str, str], content: str) -> None:
        """Write a PNG, in base64, to the folder serve.save. It is answered also if that fails."""
        if self.album:
            try:
                await asyncio.to_thread(self.album.add, texts, base64.b64decode(content))
            except OSError as error:
                logging.error("config.serve.save: a picture was not written: %s", error)

    def texts(self, queued: QueuedRequest, number: int) -> dict[str, str]:
        """The settings of a picture, for its PNG text chunk."""
        picture = queued.job.pictures[number]
        facts = self.live_facts if picture.shared.live else self.facts
        return schema.texts(queued.request, picture, facts.origin)

    async def pictures(self, gone: Gone, queued: QueuedRequest) -> list[str]:
        """The finished pictures of a request, PNG in base64. Raises Problem.

        gone: as in `follow`.
        """
        pictures = {}
        async for event in self.follow(gone, queued):
            if isinstance(event, PictureDone):
                pictures[event.number] = await self.png(queued, event)
            elif isinstance(event, Ended) and event.error:
                raise problem(event.error)
        if queued.job.left:
            raise Problem(400, "the client left")
        return [pictures[number] for number in sorted(pictures)]


def _resized(event: Event, frame: Frame) -> Event:
    """The event with its images in the size that was asked for."""
    match event:
        case Progress(previews=previews):
            return event._replace(previews={number: frame.left(image) for number, image in previews.items()})
        case PictureDone(image=image):
            return event._replace(image=frame.left(image))
    return event


def problem(error: Refused | Failed) -> Problem:
    """The answer to a request that ended with this error."""
    return Problem(400, error.message, error.field) if isinstance(error, Refused) else Problem(500, error.message)
