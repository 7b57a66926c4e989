"""Checkpoints by Orbax: the whole training state and the data position, so that a run goes on as if never stopped."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffusion_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/, the newest `keep` of them. Each appears whole or not at all."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        # saved in the foreground: when `save` returns, the checkpoint is on disk, and an error is raised here and now
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict) -> None:
        """Write a checkpoint of state.step. Raises OSError when it cannot be written; older checkpoints stay intact."""
        step = int(state.step)
        if step == self.latest_step():
            return
        rest, ema = _split(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(rest), ema=ocp.args.StandardSave(ema), data=ocp.args.JsonSave(data_state)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax lets through whatever its writers raise
            last = self.latest_step()
            kept = "there was none before" if last is None else f"the checkpoint of step {last} is intact"
            raise OSError(f"could not save step {step} to {self.folder}: {_first_line(error)}; {kept}") from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The newest state and data position; `like` gives the structure, shapes and placement."""
        rest, ema = _split(like)
        restored = self._restore(
            state=ocp.args.StandardRestore(rest), ema=ocp.args.StandardRestore(ema), data=ocp.args.JsonRestore()
        )
        fields = restored.state | {"ema": restored.ema, "key": jax.random.wrap_key_data(restored.state["key"])}
        return TrainState(**fields), restored.data

    def restore_ema(self, like: PyTree) -> PyTree:
        """The averaged weights of the newest checkpoint; `like` gives structure, shapes and placement."""
        return self._restore(ema=ocp.args.StandardRestore(like)).ema

    def _restore(self, **items):
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint in {self.folder} does not fit this config ({_first_line(error)}); "
                "use the config it was trained with, or another --workdir"
            ) from error


def _split(state: TrainState) -> tuple[dict, PyTree]:
    """(all but the average, the average), so that sampling can read the second alone. Typed keys become plain integers."""
    fields = state._asdict() | {"key": jax.random.key_data(state.key)}
    ema = fields.pop("ema")
    return fields, ema


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
