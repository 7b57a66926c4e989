"""What the program imports before its first picture."""

import subprocess
import sys

DRAW = """
import importlib, sys
from diffusion_jax.app import command
importlib.import_module(command.MODES["sample"])
from diffusion_jax.build import weights
weights.load_model("weights/emoji")
print(*sys.modules)
"""
OF_OTHER_MODES = {  # libraries of data, training and serving
    *("tensorflow", "tensorflow_datasets", "grain", "pyarrow", "orbax", "optax", "scipy", "sklearn"),
    *("uvicorn", "starlette", "pydantic"),
}


def test_sampling_imports_no_library_of_another_mode():
    run = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in run.stdout.split()}
    assert "flax" in imported
    assert not imported & OF_OTHER_MODES
