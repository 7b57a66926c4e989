"""Every signature's shapes and types are checked while the tests run. Tests that take minutes run with `--all`, those
marked documents, about an hour, with `--documents`.

Hypothesis draws the same examples on every run; `pytest --hypothesis-profile=default` draws new ones.
"""

import ctypes
import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import WorkStealingScheduling

from tests import typechecking

typechecking.install()
install_import_hook("diffusion_jax", "tests.typechecking.by_beartype")
hypothesis.settings.register_profile("repeatable", derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that take minutes, those marked slow")
    parser.addoption(
        "--documents", action="store_true", help="with --all: also run every command of docs/ and BUILD.md"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--documents"):
        for item in items:
            if item.get_closest_marker("documents"):
                item.add_marker(pytest.mark.skip(reason="needs --documents"))
    if config.getoption("--all"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)  # so that no long test ends last
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="needs --all"))


def pytest_collection_finish():
    """Leave out of every later garbage collection what the imports made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # tracing makes many objects that live


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config, log):
    """A worker takes the tests in their order, so most modules stay on one and share what they compile and train."""
    if config.getoption("dist") == "load":
        return WorkStealingScheduling(config, log)


def resident() -> float:
    """GiB of memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**30


after_dropping = 0.0  # GiB


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Drop compiled programs when they have come to take much: all of them together would take a machine's memory."""
    global after_dropping
    if not Path("/proc/self/statm").exists() or resident() < max(2.2, after_dropping + 0.4):
        return
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # gives the memory back to the system
        libc.malloc_trim(0)
    after_dropping = resident()
