"""main.py run inside the tests' own process."""

import contextlib
import io
import logging
import os
import sys
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver

import main
from diffusion_jax import parallel

ROOT = Path(main.__file__).parent


def run(monkeypatch, *arguments, cwd=ROOT) -> int:
    """python main.py with these arguments, by default in the project's folder -> the exit status."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setattr(parallel, "SMALL", parallel.SMALL)  # which configurations of tests set
    cache = jax.config.jax_compilation_cache_dir
    try:
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            main.run()
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    return ended.value.code or 0


class _Writer(logging.Handler):
    """Writes messages to a text stream. No StreamHandler, because absl removes those of standard error."""

    def __init__(self, stream: io.TextIOBase):
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write(self.format(record) + "\n")


def succeed(*arguments, cwd=ROOT) -> str:
    """What python main.py with these arguments says on its way to exit status 0.

    Without the seconds that a process of its own takes to start; with the checks of types.
    """
    said = io.StringIO()
    handler = _Writer(said)
    logging.getLogger().addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(said):
            status = run(monkeypatch, *arguments, cwd=cwd)
    finally:
        logging.getLogger().removeHandler(handler)
    assert status == 0, said.getvalue()
    return said.getvalue()
