"""The log of a run: a progress bar, `metrics.jsonl`, TensorBoard and `times.json`. Only process 0 writes."""

import json
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import logging
from PIL import Image

from diffusion_jax import parallel, paths
from diffusion_jax.messages import Progress, as_json
from diffusion_jax.paths import Path
from diffusion_jax.training.times import STEP, Account, Times, opened


class RunLog:
    """The log of one run in `workdir`, starting at step `start`. Use it as a context manager.

    train: config section with steps and batch_size.
    name, learning_rate, records: those of the `Task`.
    times: the seconds of this start, by kind of work.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        train,
        name: str,
        learning_rate: optax.Schedule | None,
        records: Callable[[], dict[str, int]],
    ):
        self.batch_size = train.batch_size
        self._learning_rate, self._records = learning_rate, records
        self._peak_flops = parallel.peak_flops()
        self._start = self._done = start
        self._pending: list[dict] = []
        self._since: float | None = None  # when the first pending step began, or the first step of all ended
        self._untimed = 1  # of the pending steps: the first one waits for compilation
        self._main = parallel.is_main()
        self._progress = Progress(name, train.steps, "step", start, shown=self._main)
        self._folder = workdir / "samples"
        if self._main:
            workdir.mkdir(parents=True, exist_ok=True)
            self._spool, self._num_boards = paths.Spool(workdir), 0
            self._lines = _reopen(workdir / "metrics.jsonl", self._spool.folder / "metrics.jsonl", start)
            self._board = self._new_board(purge_step=start + 1)
            self._before = opened(workdir / "times.json", start)
        self.times = Times()  # begins here
        self._reported = self.times.seconds(), self.times.flops

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._progress.close()
        self.times.close()
        if self._main:
            self._lines.close()
            self._board.close()
            if self._done > self._start:
                logging.info(self._account().sentence(self._done))
            try:
                if kind is None or not issubclass(kind, OSError):  # a bucket that failed would only be waited for again
                    self._write_account()
                    self._spool.publish()
            finally:
                self._spool.close()

    def _account(self) -> Account:
        """Of the run until now."""
        return self._before.plus(self.times.seconds(), self._records())

    def _write_account(self) -> None:
        paths.write(self._spool.folder / "times.json", as_json(self._account()._asdict()) + "\n")

    def publish(self) -> None:
        """Bring the log up to date for a checkpoint.

        In a bucket `metrics.jsonl` is written again, and TensorBoard gets another file. A local folder is always up to
        date.
        """
        if not self._main:
            return
        self._write_account()
        if self._spool.is_apart:
            self._board.close()
            self._spool.publish()
            self._board = self._new_board()

    def _new_board(self, purge_step: int | None = None):
        from tensorboardX import SummaryWriter  # imports torch too, where it is installed: seconds

        self._num_boards += 1
        suffix = f".{self._num_boards:06d}" if self._num_boards > 1 else ""  # TensorBoard reads files in this order
        return SummaryWriter(str(self._spool.folder / "tensorboard"), purge_step=purge_step, filename_suffix=suffix)

    def step(self, metrics: dict) -> None:
        """Record one more step.

        metrics: scalars on the device. This call does not wait for them, except the first time.
        """
        if self._since is None:
            jax.block_until_ready(metrics)
            self._since = time.perf_counter()
        self._pending.append(metrics)
        self._done += 1
        self._progress.update()

    def write(self, step: int) -> None:
        """Write the means over the steps since the last call, the speed (images/s), and the other fields of the log."""
        values = parallel.to_host(self._pending)
        now = time.perf_counter()
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        timed, self._untimed = len(values) - self._untimed, 0
        if timed:
            means["images_per_second"] = timed * self.batch_size / (now - self._since)
        means |= {name: int(values[-1][name]) for name in ("bad_steps", "bad_in_row")}
        self._pending, self._since = [], now
        if self._main:
            means |= self._times_since(len(values)) | self._facts(step - means["bad_steps"])
            self._lines.write(as_json({"step": step} | means) + "\n")
            self._lines.flush()
            for name, value in means.items():
                self._board.add_scalar(name, value, step)
            speed = f", {means['images_per_second']:.0f} images/s" if timed else ""
            self._progress.update(0, f"loss {means['loss']:.4f}{speed}")

    def _times_since(self, steps: int) -> dict[str, float]:
        """Where the time since the last call went, in which so many steps were done."""
        (before, flops_before), now = self._reported, (self.times.seconds(), self.times.flops)
        self._reported = now
        spent = {kind: seconds - before.get(kind, 0.0) for kind, seconds in now[0].items()}
        found = {"step_seconds": spent[STEP] / steps}
        if self._peak_flops:
            found["utilisation"] = (now[1] - flops_before) / (spent[STEP] * self._peak_flops)
        return found | {f"share/{kind}": seconds / sum(spent.values()) for kind, seconds in spent.items()}

    def _facts(self, updates: int) -> dict[str, float]:
        """The rate of the last of so many updates, the records of the run, and the memory of the devices, GiB."""
        found = {f"records/{name}": count for name, count in self._account().records.items()}
        found |= {f"memory_gib/{name}": size / 2**30 for name, size in parallel.memory().items()}
        if self._learning_rate and updates:
            with parallel.on_host():
                found["learning_rate"] = float(self._learning_rate(updates - 1))
        return found

    def image(self, step: int, image: np.ndarray) -> None:
        """Save an (H, W, 3) uint8 picture of samples as a file and in TensorBoard."""
        if self._main:
            self._folder.mkdir(exist_ok=True)
            with paths.written(self._folder / f"step_{step:07d}.png") as file:
                Image.fromarray(image).save(file, "PNG")
            self._board.add_image("samples", image, step, dataformats="HWC")


def _reopen(path: Path, spooled: Path, start: int):
    """Open for appending. Drop the lines of steps after the last checkpoint of a killed run.

    path: the lines so far.
    spooled: where to append, the same unless that is in a bucket.
    """
    kept_lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept_lines.append(line + "\n")
            except json.JSONDecodeError:  # the run was killed while writing this line
                break
    paths.write(spooled, "".join(kept_lines))  # in one step: a kill here loses nothing
    return spooled.open("a")
