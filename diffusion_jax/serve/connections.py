"""How the server listens: uvicorn, with limits on connections that send nothing or are too many."""

from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

PATIENCE = 5  # seconds that running requests have to finish when the server stops
HEAD = 20.0  # seconds in which the head of a request must arrive
CONNECTIONS = 1024  # open at once, half of them of one client; further ones are closed
OTHER_FILES = 0.25  # of those that the process may have open: for all but connections
PNG = 6  # bytes of a pixel of noise as a PNG in base64, at most
STATE = 1 << 20  # bytes of a state of the live canvas beside two pictures of the model's size: they may be larger


def most_connections() -> int:
    """How many connections may be open at once: each is a file, and the system limits those of a process."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return CONNECTIONS if files < 0 else min(CONNECTIONS, int((1 - OTHER_FILES) * files))  # below 0: no limit


class Connection(AutoHTTPProtocol):
    """A connection that is closed if there are too many, or if the head of a request does not arrive in time."""

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self.head_timer = None
        most, address = most_connections(), self.client and self.client[0]
        own = sum(other.client is not None and other.client[0] == address for other in self.connections)
        if len(self.connections) > most or own > max(1, most // 2):
            transport.close()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Start to wait for the rest of a head, unless it came with its beginning."""
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self.head_timer:
            self.head_timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if answered and not self.head_timer:
            self.head_timer = self.loop.call_later(HEAD, self._give_up, self.cycle)
        elif not answered and self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def _give_up(self, last_cycle: object) -> None:
        """Close the connection, if no request has begun since the last one and it is no WebSocket now."""
        self.head_timer = None
        if self.cycle is last_cycle and self.transport.get_protocol() is self:
            self.transport.close()


def settings(app: ASGIApp, size: tuple[int, int], max_upload: int, **options) -> uvicorn.Config:
    """The settings of uvicorn.

    size: height and width of the model's images, pixels.
    max_upload: bytes of a request. A message of the live canvas may have fewer, as it is received before it is counted:
      a longer one closes the connection with code 1009 and a reason.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        server_header=False,
        ws_max_size=min(max_upload, STATE + 2 * PNG * size[0] * size[1]),
        ws_max_queue=1,
        timeout_graceful_shutdown=PATIENCE,
        **options,
    )
