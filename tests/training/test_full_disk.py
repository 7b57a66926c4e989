"""A disk that fills up: one clear line, the checkpoints before it intact, and the run goes on once there is room."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import parallel
from diffusion_jax.training import loop
from diffusion_jax.training.checkpoints import Checkpoints
from tests import disk
from tests.training import linear

VALUES = 100_000
CHECKPOINT = 4 * 4 * VALUES  # bytes of weights, their average and Adam's two moments


@pytest.fixture
def small_disk(tmp_path):
    """checkpoints/ on a file system of its own that two checkpoints fit but not three; call it to resize that."""
    with disk.of_size(tmp_path / "checkpoints", str(int(2.5 * CHECKPOINT))) as resize:
        yield resize


def fit(workdir, steps=12):
    # noise does not compress
    params = linear.initial() | {"ballast": jax.random.normal(jax.random.key(0), (VALUES,))}

    def loss(params, frozen, batch, keys):
        value, metrics = linear.loss(params, frozen, batch, keys)
        return value + 1e-3 * jnp.mean(jnp.square(params["ballast"])), metrics

    task = loop.Task("linear", loss, params, linear.FROZEN, linear.batches(8), optax.adam(0.05))
    loop.fit(task, workdir, linear.section(steps=steps, checkpoint_every=3), seed=0)
    state = parallel.strategy().shapes(loop.init_state(params, task.optimizer, 0))
    return Checkpoints(workdir / "checkpoints").restore(state)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_costs_no_more_than_the_newest_checkpoint(tmp_path, small_disk, monkeypatch, foreseen):
    if not foreseen:  # as by a quota, or by another who writes there
        monkeypatch.setattr(Checkpoints, "_check_free_space", lambda self, tree: None)
    folder = tmp_path / "checkpoints"
    with pytest.raises(OSError) as error:
        fit(tmp_path)
    message = str(error.value)
    assert message.startswith("could not save step 9 to") and "the checkpoint of step 6 is intact" in message
    assert "\n" not in message and "no space left" in message
    assert Checkpoints(folder).latest_step() == 6

    small_disk(int(3.3 * CHECKPOINT))  # room for three, if the part of one that did not fit is gone
    jax.tree.map(np.testing.assert_array_equal, fit(tmp_path), fit(tmp_path / "undisturbed"))
    assert sorted(path.name for path in folder.iterdir()) == ["12", "9"]
