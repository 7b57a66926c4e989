"""Settings for the XLA compiler, and the backend that programs are made for."""

import contextlib
import os
from collections.abc import Iterator

import jax

from diffusion_jax import paths

CACHE = paths.CACHE / "xla"
CONCURRENCY = "xla_cpu_enable_concurrency_optimized_scheduler"
DATA = "data"  # the axis of a mesh whose devices hold different examples and the same weights
_planned: list[tuple[str, int]] = []  # backend and number of devices
_without_kernels: list[None] = []  # as many as such contexts are open


def configure(low_memory: bool = True) -> None:
    """Cache compiled programs on disk, so that a second start compiles nothing. Call this before JAX finds its devices.

    The cache is ~/.cache/diffusion_jax/xla, or jax_compilation_cache_dir if that is set.
    low_memory: schedule CPU programs for little memory, unless XLA_FLAGS sets the order. By default XLA schedules for
      parallelism, which needs three times the arrays for a large U-Net and trains a twentieth faster.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    flags = os.environ.get("XLA_FLAGS", "")
    if low_memory and CONCURRENCY not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{CONCURRENCY}=false".strip()


def backend() -> str:
    """The backend that programs are made for, by which networks choose their operations: "cpu", "gpu" or "tpu"."""
    return _planned[-1][0] if _planned else jax.default_backend()


def is_undivided() -> bool:
    """Whether the program that is being traced has whole arrays: in a training step, which every device runs on its own
    arrays, and on a single device. Elsewhere the compiler divides arrays over devices.
    """
    with contextlib.suppress(NameError):  # no such axis
        return jax.lax.axis_size(DATA) > 0
    return (_planned[-1][1] if _planned else jax.local_device_count()) == 1


def has_kernels() -> bool:
    """Whether networks may choose kernels, which have no forward derivative."""
    return not _without_kernels


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """In this context networks choose operations that have a forward derivative."""
    _without_kernels.append(None)
    try:
        yield
    finally:
        _without_kernels.pop()


@contextlib.contextmanager
def planned_for(backend: str, devices: int = 1) -> Iterator[None]:
    """In this context programs are made for other devices, which this machine need not have, to compile or count.

    devices: their number.
    """
    _planned.append((backend, devices))
    try:
        yield
    finally:
        _planned.pop()
