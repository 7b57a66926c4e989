"""A training step for TPUs has the fused kernel of attention where scores would leave the chip, and only there."""

import json
import os
import subprocess
import sys

import pytest

TPU_COMPILER = os.environ.get("TPU_COMPILER", "")

CODE = """
import json
import sys
import jax, jax.numpy as jnp, optax
from diffusion_jax import parallel
devices = parallel.slice_devices("v5e:2x2")
from diffusion_jax.compilation import planned_for
from diffusion_jax.models.attention import attention
from diffusion_jax.training.step import init_state, make_train_step

def loss(params, frozen, batch, keys):
    x = batch["x"]
    q, k, v = ((x @ params[name].astype(x.dtype)).reshape(*x.shape[:2], 2, 64) for name in "qkv")
    return jnp.mean(jnp.square(attention(q, k, v).astype(jnp.float32))), {}

strategy, optimizer, tokens = parallel.strategy(sys.argv[1], devices), optax.sgd(1e-3), int(sys.argv[2])
weights = {name: jax.ShapeDtypeStruct((128, 128), "float32") for name in "qkv"}
state = strategy.shapes(jax.eval_shape(lambda weights: init_state(weights, optimizer, 0), weights))
batch = strategy.batch_shapes({"x": jax.ShapeDtypeStruct((4, tokens, 128), "bfloat16")})
with planned_for("tpu", len(devices)):
    step = make_train_step(jax.checkpoint(loss), optimizer, 0.9, 1, strategy).lower(state, {}, batch).compile()
kernels = step.as_text().count('custom_call_target="tpu_custom_call"')
print(json.dumps([kernels, step.memory_analysis().temp_size_in_bytes]))
"""


def compiled(strategy, tokens):
    """(number of kernels, bytes of temporary arrays on a chip) of a step with one image a chip, two heads."""
    path = os.pathsep.join(filter(None, (TPU_COMPILER, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", CODE, strategy, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_scores_that_would_leave_the_chip_are_not_in_memory(strategy):
    if not TPU_COMPILER:
        pytest.skip(
            "the TPU compiler is not installed: pip install --no-deps --target FOLDER libtpu, TPU_COMPILER=FOLDER"
        )
    kernels, temporary = compiled(strategy, 4096)
    assert kernels >= 3 and temporary < 4 * 2 * 4096**2, "forward and both gradients"
    assert compiled(strategy, 1024)[0] == 0
