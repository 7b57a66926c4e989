"""The page, the API behind it, and the APIs of other programs: one Starlette application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from diffusion_jax.serve import description, openai, webui
from diffusion_jax.serve.bodies import error_answer, event_text, json_object
from diffusion_jax.serve.engine import Ended, PictureDone, Preparing, Progress, Queued
from diffusion_jax.serve.guard import Guard, client_of
from diffusion_jax.serve.live import live
from diffusion_jax.serve.samplers import SAMPLERS, SCHEDULERS
from diffusion_jax.serve.schema import Problem, png
from diffusion_jax.serve.service import QueuedRequest, Service, problem

PAGE = Path(__file__).parent / "page"


def application(service: Service, token: str = "", hosts: tuple[str, ...] = ()) -> ASGIApp:
    """The application.

    token, hosts: see `guard.Guard`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.engine.serving():
            yield

    async def refuse(http: Http, error: Problem | HTTPException) -> Response:
        if isinstance(error, HTTPException):
            error = Problem(error.status_code, error.detail)
        service.metrics.refused.labels(str(error.status)).inc()
        return error_answer(http.scope["path"], error)

    async def forget(http: Http, error: ClientDisconnect) -> Response:
        return await refuse(http, Problem(400, "the client left"))

    async def report_failure(http: Http, error: Exception) -> Response:
        return await refuse(http, Problem(500, "an error in the server; its log has more"))

    app = Starlette(
        routes=[*_routes(service), *openai.routes(service), *webui.routes(service)],
        exception_handlers={
            Problem: refuse,
            HTTPException: refuse,
            ClientDisconnect: forget,
            Exception: report_failure,
        },
        lifespan=lifespan,
    )
    return Guard(app, token, hosts, service.limits.max_upload)  # outermost, so that it also covers answers to errors


def _routes(service: Service) -> list[BaseRoute]:
    """The page and the API behind it."""
    document = description.openapi(service.model, service.live_model)

    async def page(http: Http) -> Response:
        return FileResponse(PAGE / "index.html")

    async def generate(http: Http) -> Response:
        queued = await service.ask(client_of(http.scope), await json_object(http))
        return StreamingResponse(_events(service, http, queued), media_type="text/event-stream")

    async def model(http: Http) -> Response:
        facts = service.facts._replace(live=None)._asdict()
        first, *other_prompts = [*service.sample.prompts, "", ""]
        defaults = {"prompt": first, "other_prompt": other_prompts[0], "live_steps": service.live_steps}
        names = {"solver_names": SAMPLERS, "spacing_names": SCHEDULERS, "prompts": list(service.sample.prompts)}
        return JSONResponse(facts | defaults | names)

    async def canvas(socket: WebSocket) -> None:
        await live(service, socket)

    async def health(http: Http) -> Response:
        engine = service.engine
        status = {"status": engine.state, "queue": len(engine.queue), "restarts": engine.restarts}
        return JSONResponse(status, 503 if engine.state in ("starting", "failed") else 200)

    async def metrics(http: Http) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(http: Http) -> Response:
        return JSONResponse(document)

    return [
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE)),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/model", model),
        WebSocketRoute("/api/live", canvas),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
    ]


async def _events(service: Service, http: Http, queued: QueuedRequest) -> AsyncIterator[str]:
    """A request's events as server-sent events: queued, preparing, progress, picture, animation (of a morph), done or
    error.
    """
    job, frames = queued.job, {}
    async for event in service.follow(http.is_disconnected, queued):
        match event:
            case Queued(position=position):
                seconds = round(service.engine.seconds_before(job), 1)
                yield event_text("queued", {"position": position, "seconds": seconds})
            case Preparing(size=(height, width), seconds=seconds):
                yield event_text("preparing", {"height": height, "width": width, "seconds": round(seconds)})
            case Progress(done=done, total=total, previews=previews):
                pngs = {number: await asyncio.to_thread(png, image, {}) for number, image in previews.items()}
                yield event_text("progress", {"done": done, "total": total, "left": job.left, "previews": pngs})
            case PictureDone(number=number, image=image):
                frames[number] = image
                seed = job.pictures[number].seed
                content = {"number": number, "seed": seed, "image": await service.png(queued, event)}
                yield event_text("picture", content | {"settings": service.texts(queued, number)})
            case Ended(error=None):
                if queued.request.task == "morph":
                    ordered = [frames[number] for number in sorted(frames)]
                    yield event_text("animation", await service.animation(queued, ordered))
                yield event_text("done", {})
            case Ended(error=error):
                failure = problem(error)
                yield event_text("error", {"message": failure.message, "status": failure.status})
