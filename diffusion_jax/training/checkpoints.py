"""Checkpoints with Orbax: the whole training state, so that a run resumes exactly."""

import os
import pathlib
import secrets
import time
from logging import getLogger

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

from diffusion_jax import hosts, messages, parallel, paths
from diffusion_jax.paths import Path
from diffusion_jax.training.averages import flat_leaves
from diffusion_jax.training.step import TrainState

ARRAY_DESCRIPTION = 2048  # upper estimate of the bytes of metadata that Orbax writes for an array
NOTICE = 30  # seconds between the warning of a spot VM and its end
UNSAFE, UNSAFE_IN_BUCKET = "[", "[*?#"  # Orbax takes a path for a pattern, and one of a bucket for a web address
PROBE = 1 << 26  # bytes written to measure the speed of the disk
QUICK = 1 << 30  # bytes of a state that any disk takes in time

# Orbax logs each error with its traceback and raises it as well. What it raises is told here in one line.
_ORBAX = str(pathlib.Path(ocp.__file__).parent)
logging.get_absl_logger().addFilter(lambda record: not record.pathname.startswith(_ORBAX))
getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())  # of its reads that end in an error


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/. A checkpoint is never visible half written.

    `save` returns before the checkpoint is written, and training goes on meanwhile. Use this class as a context
    manager: it waits until the last checkpoint is on disk.

    keep: number of newest checkpoints to keep. 0 only reads, and changes nothing in the folder.
    Raises ValueError for a path that Orbax would take for a pattern, and OSError for a folder that cannot be read.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder, self._saving = paths.absolute(folder), keep > 0
        unsafe = UNSAFE_IN_BUCKET if paths.in_bucket(self.folder) else UNSAFE
        if found := sorted(set(unsafe) & set(str(self.folder))):
            raise ValueError(
                f"{self.folder}: checkpoints cannot be kept in a folder with {' '.join(found)} in its path: rename it, "
                "or name another --workdir"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            create=self._saving,
            cleanup_tmp_directories=self._saving,  # a killed run or a full disk leaves a partial checkpoint
            enable_async_checkpointing=self._saving,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:  # several libraries take part in a request
            if not paths.in_bucket(self.folder):
                raise
            raise OSError(f"cannot read {self.folder} ({messages.first_line(error)}): {paths.ROLES}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None and hosts.several():
            return  # the hosts without this error would not come to wait together
        try:
            self.finish()
        except OSError:
            if kind is None:  # an error on its way out says more
                raise

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def warn_if_slow(self, state: TrainState) -> None:
        """Warn if a checkpoint of such a state takes longer than a spot VM has left after its warning.

        The disk is measured only for a large state.
        """
        divided = any(map(parallel.is_divided, jax.tree.leaves(state)))
        size = disk_space(state) / (jax.process_count() if divided else 1)  # that this host writes
        if size < QUICK or not parallel.is_main():
            return
        seconds = size / PROBE * _seconds_to_write(self.folder, PROBE)
        if seconds > NOTICE:
            logging.warning(
                "a checkpoint of %s takes about %.0f s in %s, and a spot VM ends %d s after its warning: "
                "the steps since the last checkpoint would be lost, lower train.checkpoint_every to lose fewer",
                *(messages.size(size), seconds, self.folder, NOTICE),
            )

    def save(self, state: TrainState) -> None:
        """Copy the state to the host and start to write a checkpoint of state.step. Waits for the one before.

        Raises OSError if that one could not be written, or if there is no space for this one. Older checkpoints stay
        intact.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        self.finish()
        # whole arrays as numpy: several hosts have one each from `pmap`, which Orbax refuses, and it would copy them on
        # the device. Real copies, because the next step overwrites the state.
        state = jax.tree.map(lambda leaf: leaf if parallel.is_divided(leaf) else np.array(leaf), state)
        remaining, ema = _split(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(remaining),
            ema=ocp.args.StandardSave(ema),
            sums=ocp.args.JsonSave({"state": _sums(remaining), "ema": _sums(ema)}),
        )
        try:
            self._check_free_space(state)  # checked first, because Orbax reports a full disk in hundreds of lines
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax passes on any error of its writers
            raise self._not_saved(step, error) from error

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Raises OSError if it could not be written."""
        step = self.latest_step()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(step, error) from error

    def _not_saved(self, step: int, error: Exception) -> OSError:
        last = self.latest_step()
        earlier = "there was none before" if last is None else f"the checkpoint of step {last} is intact"
        reason = "no space left on the disk" if "No space left" in str(error) else messages.first_line(error)
        return OSError(f"could not save step {step} to {self.folder}: {reason}; {earlier}")

    def _check_free_space(self, state: TrainState) -> None:
        need, free = disk_space(state), paths.free_space(self.folder)
        if free < need:
            raise OSError(f"no space left on the disk, {messages.size(need)} needed and {messages.size(free)} free")

    def restore(self, like: TrainState) -> TrainState:
        """The newest state that is intact.

        like: gives the structure, shapes and shardings.
        """
        remaining, ema = _split(like)
        restored = self._restore(state=remaining, ema=ema)
        return like._replace(**restored["state"], ema=restored["ema"])

    def restore_ema(self, like: PyTree) -> PyTree:
        """The averaged weights of the newest checkpoint that is intact, as numpy.

        like: gives structure and shapes.
        """
        # numpy as an example asks for numpy, whatever devices the training had
        example = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), like)
        return self._restore(ema=example)["ema"]

    def check(self, like: PyTree) -> None:
        """Raise ValueError, naming the first difference, if averaged weights in the newest checkpoint that can be read
        have other shapes than `like`.

        Reads only metadata.
        """
        for step in self._steps():
            try:
                return self._check(step, ema=like)
            except OtherConfig:
                raise
            except Exception as error:  # Orbax passes on any error of its readers
                logging.debug("step %d: %s", step, error)

    def _check(self, step: int, **items: PyTree) -> None:
        for name, like in items.items():
            metadata = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / name)
            saved, expected = _shapes(metadata.tree), _shapes(like)
            for path in sorted(saved.keys() | expected.keys()):
                if saved.get(path) != expected.get(path):
                    saved_shape, expected_shape = (shapes.get(path, "missing") for shapes in (saved, expected))
                    raise OtherConfig(
                        f"the checkpoint in {self.folder} does not fit this config ({path}: {saved_shape} there, "
                        f"{expected_shape} in the config's model); use the config it was trained with, or another "
                        "--workdir"
                    )

    def _steps(self) -> list[int]:
        """The steps with a checkpoint, the newest first. Raises FileNotFoundError without any."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        return steps

    def _restore(self, **items: PyTree) -> dict[str, PyTree]:
        """The items of the newest checkpoint that is intact. A run that saves sets newer ones aside.

        Several hosts read different files, so one of them may find damage alone: then the run ends.
        """
        damaged: dict[int, str] = {}
        for step in self._steps():
            try:
                restored = self._read(step, items)
            except NOT_DAMAGE:
                raise
            except Exception as error:  # Orbax passes on any error of its readers
                damaged[step] = messages.first_line(error)
                if hosts.several():
                    raise ValueError(
                        f"the checkpoint of step {step} in {self.folder} is damaged ({damaged[step]}): move its folder "
                        "away to go on from the one before"
                    ) from error
                continue
            for newer, reason in damaged.items():
                logging.warning(
                    "the checkpoint of step %d in %s is damaged (%s); that of step %d is used",
                    *(newer, self.folder, reason, step),
                )
                if self._saving:
                    self._set_aside(newer)
            return restored
        step, reason = next(iter(damaged.items()))
        raise ValueError(
            f"no checkpoint in {self.folder} can be read, the one of step {step} is damaged: {reason}; "
            "move the folder away to train anew, or name another --workdir"
        )

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again."""
        (self.folder / str(step)).rename(self.folder / f"damaged-{step}")
        self._manager.reload()

    def _read(self, step: int, items: dict[str, PyTree]) -> dict[str, PyTree]:
        """Raises OtherConfig, and any other exception for a damaged checkpoint."""
        # checked first, because Orbax may fail in the middle of reading arrays of other shapes
        self._check(step, **items)
        has_sums = (self.folder / str(step) / "sums").exists()  # checkpoints of earlier versions have none
        args = {name: ocp.args.StandardRestore(like) for name, like in items.items()}
        if has_sums:
            args["sums"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        for name in items if has_sums else ():
            for path, value in _sums(restored[name]).items():
                if value != restored["sums"][name][path]:
                    raise ValueError(f"the values of {path} are not those that were saved")
        return {name: restored[name] for name in items}


class OtherConfig(ValueError):
    """A checkpoint of another model or optimizer."""


NOT_DAMAGE = (OtherConfig, MemoryError, PermissionError, ConnectionError, TimeoutError, jax.errors.JaxRuntimeError)


def _seconds_to_write(folder: Path, size: int) -> float:
    """Seconds to write `size` bytes of a new file to the folder, measured. The file is removed."""
    trial, start = folder / f"trial-{secrets.token_hex(4)}", time.monotonic()
    try:
        if paths.in_bucket(folder):
            trial.write_bytes(bytes(size))
        else:
            with trial.open("wb") as file:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())
        return time.monotonic() - start
    finally:
        trial.unlink(missing_ok=True)


def _split(state: TrainState) -> tuple[dict, PyTree]:
    """(everything but the average, the average). Sampling then reads only the average."""
    fields = state._asdict()
    ema = fields.pop("ema")
    if not state.averages:
        del fields["averages"]  # so that a run of an earlier version can go on
    return fields, ema


def disk_space(tree: PyTree) -> int:
    """Bytes on disk of a checkpoint of these arrays, or of arrays with these shapes."""
    return sum(leaf.size * leaf.dtype.itemsize + ARRAY_DESCRIPTION for leaf in jax.tree.leaves(tree))


def _shapes(tree: PyTree) -> dict[str, str]:
    """The shape of each array by its path. Works for a checkpoint's metadata too."""
    return {path: f"shape {tuple(leaf.shape)}" for path, leaf in flat_leaves(tree)}


def _sums(tree: PyTree) -> dict[str, int]:
    """The sum of each array's bits, as unsigned numbers modulo 2^32. It does not depend on where the parts are."""
    paths, leaves = zip(*flat_leaves(tree), strict=True)
    own = [sum(_sum(part) for part in parallel.own_parts(leaf)) % 2**32 for leaf in leaves]
    totals = parallel.from_all_hosts(np.array(own, np.uint32)).sum(0, dtype=np.uint32)
    return dict(zip(paths, totals.tolist(), strict=True))


def _sum(array: np.ndarray) -> int:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return int(bits.sum(dtype=np.uint32))
