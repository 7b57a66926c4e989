"""The live canvas: the server asks for a frame, the client answers with its newest state, and it is drawn.

The client sends fields of `schema.Request` as JSON when it is asked, and not before. So only its newest state counts,
and nothing piles up on a slow server. A state that equals the one before is not drawn again.
"""

import asyncio
import base64
from time import monotonic

from starlette.websockets import WebSocket, WebSocketDisconnect

from diffusion_jax.serve.bodies import parsed
from diffusion_jax.serve.guard import client_of
from diffusion_jax.serve.schema import Problem
from diffusion_jax.serve.service import Gone, Service


async def live(service: Service, socket: WebSocket) -> None:
    """Serve one canvas until it is closed. Sends {"type": "next"} to ask, and answers with {"type": "frame"} and then
    the PNG in bytes, with {"type": "same"}, or with {"type": "error", "message": ...}. A message in bytes closes it.
    """
    await socket.accept()
    client = client_of(socket.scope)
    last, coming = None, asyncio.create_task(socket.receive_text())

    async def gone() -> bool:
        return coming.done() and coming.exception() is not None

    try:
        while True:
            await socket.send_json({"type": "next"})
            try:
                state = await coming
            except KeyError:  # Starlette's error for bytes instead of text
                await socket.close(1003, "expected JSON as text, got bytes")
                return
            coming = asyncio.create_task(socket.receive_text())
            if state == last:
                await socket.send_json({"type": "same"})
                continue
            last, start = state, monotonic()
            try:
                image = await _frame(service, gone, client, state)
            except Problem as wrong:
                last = None
                await socket.send_json({"type": "error", "message": wrong.message, "retry": wrong.retry})
                continue
            await socket.send_json({"type": "frame", "seconds": monotonic() - start})
            await socket.send_bytes(image)
    except (WebSocketDisconnect, RuntimeError):  # closed, also while sending
        return
    finally:
        coming.cancel()


async def _frame(service: Service, gone: Gone, client: str, state: str) -> bytes:
    """The picture of a state of the canvas, PNG."""
    values = parsed(state, "a frame")
    values = {"steps": service.live_steps} | values | {"num_images": 1}
    pictures = await service.pictures(gone, await service.ask(client, values, live=True))
    return base64.b64decode(pictures[0])
