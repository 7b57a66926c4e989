"""Checkpoints with Orbax: the whole training state and the data position, so that a run resumes exactly."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr
from jaxtyping import PyTree

from diffusion_jax import parallel, paths
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path
from diffusion_jax.training.step import TrainState

MAX_DATA_STATE = 1 << 16  # bytes of a data iterator's state
ARRAY_DESCRIPTION = 2048  # upper estimate of the bytes of metadata that Orbax writes for an array


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/. A checkpoint is never visible half written.

    keep: number of newest checkpoints to keep. 0 only reads, and changes nothing in the folder.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = paths.absolute(folder)
        saving = keep > 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            create=saving,
            cleanup_tmp_directories=saving,  # a killed run or a full disk leaves a partial checkpoint
            enable_async_checkpointing=False,  # `save` returns when all is on disk, and raises errors itself
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict) -> None:
        """Write a checkpoint of state.step. Raises OSError if it cannot be written; older checkpoints stay intact."""
        step = int(state.step)
        if step == self.latest_step():
            return
        state = parallel.to_host(state)
        remaining, ema = _split(state)
        data = {"hosts": _gather_data_states(data_state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(remaining), ema=ocp.args.StandardSave(ema), data=ocp.args.JsonSave(data)
        )
        try:
            self._check_free_space(state)  # checked first, because Orbax reports a full disk in hundreds of lines
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax passes on any error of its writers
            last = self.latest_step()
            earlier = "there was none before" if last is None else f"the checkpoint of step {last} is intact"
            reason = "no space left on the disk" if "No space left" in str(error) else first_line(error)
            raise OSError(f"could not save step {step} to {self.folder}: {reason}; {earlier}") from error

    def _check_free_space(self, tree: PyTree) -> None:
        leaves = jax.tree.leaves(tree)
        need = sum(leaf.nbytes + ARRAY_DESCRIPTION for leaf in leaves)
        free = paths.free_space(self.folder)
        if free < need:
            raise OSError(f"no space left on the disk, {need / 1e6:.1f} MB needed and {free / 1e6:.1f} MB free")

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The newest state and data position; `like` gives the structure, shapes and placement."""
        remaining, ema = _split(like)
        restored = self._restore(
            state=ocp.args.StandardRestore(remaining), ema=ocp.args.StandardRestore(ema), data=ocp.args.JsonRestore()
        )
        return like._replace(**restored.state, ema=restored.ema), _data_state_of_this_host(restored.data["hosts"])

    def restore_ema(self, like: PyTree) -> PyTree:
        """The averaged weights of the newest checkpoint; `like` gives structure, shapes and placement."""
        return self._restore(ema=ocp.args.StandardRestore(like)).ema

    def check(self, like: PyTree) -> None:
        """Raise ValueError, naming the first difference, if shapes in the newest checkpoint differ from those of
        `like`.

        Reads only metadata.
        """
        saved = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.folder / str(self._newest()) / "ema").tree)
        expected = _shapes(like)
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                saved_shape, expected_shape = (shapes.get(name, "missing") for shapes in (saved, expected))
                raise self._other_config(f"{name}: {saved_shape} there, {expected_shape} in the config's model")

    def _newest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        return step

    def _restore(self, **items):
        step = self._newest()
        # checked first, because Orbax may fail in the middle of reading arrays of other shapes
        self.check(items["ema"].item)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise self._other_config(first_line(error)) from error

    def _other_config(self, difference: str) -> ValueError:
        return ValueError(
            f"the checkpoint in {self.folder} does not fit this config ({difference}); "
            "use the config it was trained with, or another --workdir"
        )


def _split(state: TrainState) -> tuple[dict, PyTree]:
    """(everything but the average, the average). Sampling then reads only the average."""
    fields = state._asdict()
    ema = fields.pop("ema")
    if not state.averages:
        del fields["averages"]  # so that a run of an earlier version can go on
    return fields, ema


def _shapes(tree: PyTree) -> dict[str, str]:
    """The shape of each array by its path. Works for a checkpoint's metadata too."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): f"shape {tuple(leaf.shape)}" for path, leaf in leaves}


def _gather_data_states(data_state: dict) -> list[dict]:
    """The data positions of all hosts. They differ because each host reads its own share of the data."""
    text = json.dumps(data_state).encode()
    padded = np.frombuffer(text.ljust(MAX_DATA_STATE), np.uint8)
    if len(padded) > MAX_DATA_STATE:
        raise ValueError(f"the data position takes {len(text)} bytes, at most {MAX_DATA_STATE} fit a checkpoint")
    return [json.loads(row.tobytes()) for row in parallel.from_all_hosts(padded)]


def _data_state_of_this_host(data_states: list[dict]) -> dict:
    if len(data_states) != jax.process_count():
        raise ValueError(
            f"the checkpoint was saved by {len(data_states)} hosts and this run has {jax.process_count()}; "
            "use as many hosts as before"
        )
    return data_states[jax.process_index()]
