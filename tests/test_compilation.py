"""Settings for the XLA compiler, tested in separate processes."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from diffusion_jax.compilation import configure
configure({})
program = jax.jit(lambda x: sum(jnp.sort(x * i).sum() for i in range(8)))
print(program.lower(jnp.ones((256, 256))).compile().memory_analysis().temp_size_in_bytes)
print(jax.config.jax_compilation_cache_dir)
"""


def process(argument: str, **environment: str) -> tuple[int, str]:
    """Temporary bytes of a program and the folder of the compilation cache after `configure(argument)`."""
    theirs = "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"
    inherited = {name: value for name, value in os.environ.items() if name not in theirs}
    command = [sys.executable, "-c", PROGRAM.format(argument)]
    done = subprocess.run(command, env=inherited | environment, stdout=subprocess.PIPE, text=True, check=True)
    memory, folder = done.stdout.splitlines()
    return int(memory), folder


def test_programs_use_little_memory_unless_told_otherwise(tmp_path):
    home = {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    little, folder = process("", **home)
    assert folder == str(tmp_path / ".cache" / "diffusion_jax" / "xla")
    fast, _ = process("low_memory=False", **home)
    own, _ = process("", XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=true", **home)
    assert little < fast == own
