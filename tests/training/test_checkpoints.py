"""A damaged checkpoint: one line, and the one before is used. What is read is what was saved."""

import shutil

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import messages, parallel
from diffusion_jax.training import loop
from diffusion_jax.training.checkpoints import Checkpoints, disk_space
from tests.training import linear
from tests.training.test_loop import fit, saved


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of a run with checkpoints of steps 8 and 12."""
    workdir = tmp_path_factory.mktemp("finished")
    fit(workdir)
    return workdir


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def delete(file):
    file.unlink()


def damaged_copies(finished, tmp_path):
    """(the file that was damaged, a copy of the work directory), for each file of the newest checkpoint."""
    newest = finished / "checkpoints" / "12"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    for i, file in enumerate(files):
        for j, damage in enumerate((truncate, flip_a_bit, delete)):
            copy = tmp_path / f"{i}-{j}"
            shutil.copytree(finished, copy)
            damage(copy / "checkpoints" / "12" / file)
            yield file, copy


def test_a_checkpoint_is_read_as_it_was_saved_or_the_one_before_is(finished, tmp_path, caplog):
    whole, before = saved(finished), None
    for file, copy in damaged_copies(finished, tmp_path):
        caplog.clear()
        state = saved(copy)
        if state.step == 12:  # a file that says nothing of the values
            jax.tree.map(np.testing.assert_array_equal, state, whole)
            assert not caplog.records
            continue
        before = state if before is None else before
        jax.tree.map(np.testing.assert_array_equal, state, before)
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith(f"the checkpoint of step 12 in {copy / 'checkpoints'} is damaged ("), file
        assert line.endswith("that of step 8 is used") and "\n" not in line
    assert before.step == 8


def test_a_value_that_changed_on_disk_is_found(finished, tmp_path, monkeypatch):
    """As by a disk that answers with other bytes: Orbax reads them without a complaint."""
    original = Checkpoints._read

    def altered(self, step, items):
        restore = self._manager.restore

        def flipped(step, args):
            restored = restore(step, args=args)
            if step == 12:
                weights = np.array(restored["ema"]["w"])
                weights.view(np.uint32)[1] ^= 1  # the smallest change there is
                restored["ema"]["w"] = weights
            return restored

        monkeypatch.setattr(self._manager, "restore", flipped)
        return original(self, step, items)

    monkeypatch.setattr(Checkpoints, "_read", altered)
    assert saved(finished).step == 8


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_end(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "12" / "state" / "manifest.ocdbt")
    fit(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "run"), saved(finished))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8", "damaged-12"]


@pytest.mark.parametrize(
    "error", [MemoryError("full"), PermissionError("not yours"), loop.Stopped("stopped by SIGTERM")]
)
def test_what_is_no_damage_sets_nothing_aside(error, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")

    def fail(self, step, items):
        raise error

    monkeypatch.setattr(Checkpoints, "_read", fail)
    with pytest.raises(type(error)):
        fit(tmp_path / "run", steps=20)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8"]


def test_one_of_several_hosts_does_not_choose_another_checkpoint(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    delete(tmp_path / "run" / "checkpoints" / "12" / "ema" / "_METADATA")
    monkeypatch.setattr("diffusion_jax.hosts.several", lambda: True)
    with pytest.raises(ValueError, match=r"step 12 .* is damaged \(.*\): move its folder away") as error:
        Checkpoints(tmp_path / "run" / "checkpoints").restore_ema(linear.initial())
    assert "\n" not in str(error.value)


def test_reading_removes_nothing(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    delete(tmp_path / "run" / "checkpoints" / "12" / "ema" / "_METADATA")
    Checkpoints(tmp_path / "run" / "checkpoints").restore_ema(linear.initial())
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8"]


def test_nothing_intact_is_one_clear_line(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for step in ("8", "12"):
        truncate(tmp_path / "run" / "checkpoints" / step / "ema" / "manifest.ocdbt")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read, the one of step 12 is damaged: ") as error:
        fit(tmp_path / "run", steps=20)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8"]


def test_another_optimizer_is_no_damage(finished):
    checkpoints = Checkpoints(finished / "checkpoints", keep=2)
    other = parallel.strategy().shapes(loop.init_state(linear.initial(), optax.sgd(0.1, momentum=0.9), 0))
    with pytest.raises(ValueError, match=r"does not fit this config \(opt_state/0") as error:
        checkpoints.restore(other)
    assert "\n" not in str(error.value)
    assert checkpoints.latest_step() == 12


def test_a_slow_disk_is_told_before_the_run(finished, tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = saved(finished)
    checkpoints.warn_if_slow(state)
    assert not caplog.records
    monkeypatch.setattr("diffusion_jax.training.checkpoints.QUICK", 1)
    monkeypatch.setattr("diffusion_jax.training.checkpoints.NOTICE", 0)
    checkpoints.warn_if_slow(state)
    (line,) = (record.getMessage() for record in caplog.records)
    size = messages.size(disk_space(state))
    assert line.startswith(f"a checkpoint of {size} takes about 0 s in") and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run[1]", "[a]"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_refused(name, tmp_path):
    """Else its checkpoints are written and can never be read."""
    with pytest.raises(ValueError, match=r"checkpoints cannot be kept in a folder with \[ in its path: rename it"):
        Checkpoints(tmp_path / name / "checkpoints", keep=2)
    assert not (tmp_path / name).exists()
