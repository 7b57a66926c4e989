"""The tests. Most of their time goes into compiling small programs.

So these are compiled in a hurry, and once for all processes of a run: they are kept until it ends, or in the folder
that JAX_COMPILATION_CACHE_DIR names.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version


def device_flags(count: int) -> str:
    """XLA_FLAGS for a process in which this host shows so many devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
CHEAP = "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""  # later XLA has no choice
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CHEAP}".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the processes started from here inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffusion_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
