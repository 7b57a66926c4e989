"""A damaged checkpoint costs no more than the steps since the one before."""

import jax
import numpy as np
import optax
import pytest

from diffusion_jax.training import loop
from tests.test_main import arrays
from tests.training import linear


def fit(workdir, steps):
    """Train, with enough weights for a file of their own -> every array of the last checkpoint."""
    params = linear.initial() | {"ballast": jax.random.normal(jax.random.key(0), (1000,))}

    def loss(params, frozen, batch, keys):
        value, metrics = linear.loss(params, frozen, batch, keys)
        return value + 1e-3 * (params["ballast"] ** 2).mean(), metrics

    task = loop.Task("linear", loss, params, linear.FROZEN, linear.batches(8), optax.adam(0.05))
    loop.fit(task, workdir, linear.section(steps=steps), seed=0)
    return arrays(workdir)


def by_size(folder):
    """Its files, the largest first."""
    return sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)


def truncate(folder):
    largest = by_size(folder)[0]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def delete_half(folder):
    for file in by_size(folder)[::2]:
        file.unlink()


def empty(folder):
    for file in by_size(folder):
        file.write_bytes(b"")


def flip_a_byte(folder):
    largest = by_size(folder)[0]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"), 16)


@pytest.mark.parametrize("damage", [truncate, delete_half, empty, flip_a_byte])
def test_a_damaged_checkpoint_is_left_for_the_one_before(damage, whole, tmp_path, caplog):
    fit(tmp_path, 12)
    damage(tmp_path / "checkpoints" / "12")
    jax.tree.map(np.testing.assert_array_equal, fit(tmp_path, 16), whole)
    warnings = [record.getMessage() for record in caplog.records if "checkpoint of step 12" in record.getMessage()]
    assert len(warnings) == 1 and "\n" not in warnings[0] and "step 8" in warnings[0]


def test_if_every_checkpoint_is_damaged_one_line_says_so(tmp_path):
    fit(tmp_path, 12)
    for step in ("8", "12"):
        empty(tmp_path / "checkpoints" / step)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read") as error:
        fit(tmp_path, 16)
    assert "\n" not in str(error.value)
