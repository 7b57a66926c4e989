"""How XLA compiles the programs of a process."""

import os
from pathlib import Path

import jax

CACHE = Path.home() / ".cache" / "diffusion_jax" / "xla"
CONCURRENCY = "xla_cpu_enable_concurrency_optimized_scheduler"


def configure(low_memory: bool = True) -> None:
    """Keep compiled programs, so that a second start compiles nothing. Call it before JAX finds its devices.

    They are kept in ~/.cache/diffusion_jax/xla, or where jax_compilation_cache_dir says.
    low_memory: order programs for a CPU for little memory, unless XLA_FLAGS has its own word on it. XLA would order
    them so that much could run at the same time, and keep three times the arrays of a large U-Net for that; training is
    a twentieth faster so.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    flags = os.environ.get("XLA_FLAGS", "")
    if low_memory and CONCURRENCY not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{CONCURRENCY}=false".strip()
