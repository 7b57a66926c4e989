"""What a compiled step sends between devices: weights are gathered and gradients scattered; activations stay."""

import math
import os
import re
import subprocess
import sys

import pytest

from tests import device_flags

WIDTH = 512  # whose parts need no padding on a TPU, so that the operations have their plain names

TPU_COMPILER = os.environ.get("TPU_COMPILER", "")  # a folder of its own: where it is installed, JAX looks for a TPU

CODE = """
import sys
import jax, optax
from diffusion_jax import parallel
if sys.argv[1] == "tpu":
    devices = parallel.slice_devices("v5e:2x4")
from diffusion_jax.training import step as steps
from tests.training import test_parallel as t
if sys.argv[1] == "cpu":
    devices = jax.devices()
t.WIDTH = int(sys.argv[3])
strategy, optimizer = parallel.strategy(sys.argv[2], devices), optax.adam(1e-3)
loss = jax.checkpoint(t.loss_in_bfloat16) if sys.argv[4] == "True" else t.loss_in_bfloat16
step = steps.make_train_step(loss, optimizer, 0.9, 2, strategy)
state = strategy.shapes(jax.eval_shape(lambda: steps.init_state(t.initial(), optimizer, 0)))
batch = strategy.batch_shapes({"x": jax.ShapeDtypeStruct((32, t.WIDTH), "float32")})
frozen = strategy.shapes({"map": jax.ShapeDtypeStruct((t.WIDTH, t.WIDTH), "float32")})
print(step.lower(state, frozen, batch).compile().as_text())
"""


def collectives(platform: str, strategy: str, checkpointed: bool) -> dict[str, set[str]]:
    """The compiled step's collective operations -> the types of their results.

    checkpointed: the layers are computed again in the backward pass, as with `remat`.
    """
    environment = os.environ | {
        "XLA_FLAGS": device_flags(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (TPU_COMPILER, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-c", CODE, platform, strategy, str(WIDTH), str(checkpointed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, set[str]] = {}
    operation = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for result, name in re.findall(operation, done.stdout):
        found.setdefault(name, set()).update(re.findall(r"\w+\[[\d,]*\]", result))
    return found


def sizes(types: set[str]) -> set[int]:
    """The numbers of elements of arrays such as f32[8,160]."""
    return {math.prod(int(size) for size in re.findall(r"\[(.*)\]", array)[0].split(",") if size) for array in types}


def check(platform: str, checkpointed: bool) -> None:
    divided, replicated = (collectives(platform, strategy, checkpointed) for strategy in ("fsdp", "pmap"))
    weight = WIDTH**2
    # the result of a pair's first half may have the operand too
    assert weight in sizes(divided["all-gather"]) <= {weight, weight // 8}, "weights alone are gathered"
    assert sizes(divided["reduce-scatter"]) == {weight // 8}
    assert weight not in sizes(divided.get("all-reduce", set())), "gradients are not added up whole"
    assert {"all-gather", "reduce-scatter"} <= divided.keys() <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert replicated.keys() == {"all-reduce"} and weight in sizes(replicated["all-reduce"])
    if platform == "tpu":  # a CPU sends nothing in bfloat16
        assert all(array.startswith("bf16") for array in divided["all-gather"]), "weights are cast before they are sent"
    assert all(array.startswith("f32") for array in divided["reduce-scatter"] | replicated["all-reduce"])


def test_collectives_on_cpu():
    check("cpu", checkpointed=False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_collectives_on_tpu(checkpointed):
    if not TPU_COMPILER:
        pytest.skip(
            "the TPU compiler is not installed: pip install --no-deps --target FOLDER libtpu, TPU_COMPILER=FOLDER"
        )
    check("tpu", checkpointed)
