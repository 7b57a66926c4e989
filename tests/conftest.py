"""Every public signature's shapes and types are checked while the tests run.

Hypothesis draws the same examples on every run; `pytest --hypothesis-profile=default` draws new ones.
"""

import gc

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("diffusion_jax", "beartype.beartype")
hypothesis.settings.register_profile("repeatable", derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """After each module: all of them together would take a machine's memory."""
    yield
    jax.clear_caches()
    gc.collect()
