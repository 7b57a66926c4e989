"""Ports of this machine."""

import socket


def free_port() -> int:
    """A port that nothing uses yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
