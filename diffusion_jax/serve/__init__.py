"""--mode=serve: a page and an HTTP API that draw with a model."""

import functools
import ipaddress
import re
import socket
from urllib.parse import quote

import uvicorn
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import paths
from diffusion_jax.build import fields
from diffusion_jax.paths import Path
from diffusion_jax.serve import connections, loading
from diffusion_jax.serve.engine import Engine
from diffusion_jax.serve.saving import Album
from diffusion_jax.serve.server import application
from diffusion_jax.serve.service import Service

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def run(config: ConfigDict, workdir: Path) -> None:
    """Serve the model of a config until it is interrupted.

    Raises ValueError and OSError for a model that cannot be loaded, an address that cannot be used, and one that others
    can reach without a token.
    """
    config = ConfigDict(config)
    if "serve" not in config:
        config.serve = fields.section(fields.SERVE)
    section = config.serve
    token = _token(section.token_file)
    if not token and not _is_loopback(section.host):
        raise ValueError(
            f"config.serve.host={section.host} can be reached by others: set config.serve.token_file to a file with a "
            "token that they must send, or leave the host out"
        )
    names, album = _names(section), Album(section.save) if section.save else None
    listening = _listening(section.host, section.port)
    engine = Engine(functools.partial(loading.load, config, workdir), section.queue)
    try:
        facts = engine.start()
        logging.info("weights: %s", facts.origin)
        app = application(Service(engine, facts, config, album), token, () if token else names)
        logging.info("open %s", _address(section.host, listening.getsockname()[1], token))
        settings = connections.settings(app, facts.size, section.max_upload, log_level="warning")
        server = uvicorn.Server(settings)
        server.run(sockets=[listening])
    finally:
        engine.stop()


def _names(section: ConfigDict) -> tuple[str, ...]:
    """The names of the server that a Host header may have. Raises ValueError for what is no name."""
    for name in section.hosts:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"config.serve.hosts: expected names such as host.docker.internal, without a port, got {name!r}"
            )
    return (*LOOPBACK, section.host, *(name.lower() for name in section.hosts))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises ValueError for one that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason, _, _ = str(error.strerror).partition(" (while")
        raise ValueError(
            f"cannot listen at config.serve.host={host}, config.serve.port={port}: {reason}; set another one, port 0 "
            "for any that is free"
        ) from error


def _token(file: str) -> str:
    """The token in a file, or "" without one. Raises ValueError for a file that cannot be read, and an empty one."""
    if not file:
        return ""
    try:
        token = paths.local(file, "config.serve.token_file").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.serve.token_file: expected a file of text, got {file} ({error})") from error
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"config.serve.token_file: expected one line of ASCII in {file}")
    return token


def _address(host: str, port: int, token: str) -> str:
    """The address to open in a browser. It contains the token."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}" + (f"/?token={quote(token, safe='')}" if token else "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
