"""The runs behind the tables, each trained and measured once, and the figures in their reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from diffusion_jax.app import evaluate, train
from diffusion_jax.build import fields

OVERLAP = ("precision", "recall", "density", "coverage")
Report = dict


class Runs(NamedTuple):
    """Runs in folders of `folder`; with `small`, of a tiny size that measures nothing."""

    folder: Path
    small: bool

    def measured(self, name: str, config: ConfigDict, of: str | None = None) -> Report:
        """The report of a config: trained in its folder, or with the weights of another run.

        of: the other run; "" for the demo weights.
        """
        workdir = self.folder / name
        report = workdir / "eval" / "report.json"
        if not report.exists():
            fields.check(config)
            frozen = FrozenConfigDict(config)
            _link(workdir / "cache", self.folder / "cache")
            if of is None:
                train.run(frozen, workdir)
            elif of:
                _link(workdir / "checkpoints", self.folder / of / "checkpoints")
            evaluate.run(frozen, workdir)
        measures = json.loads(report.read_text())
        return measures["distances"] | {"scenes": measures.get("scenes")}

    def seconds_per_step(self, name: str, config: ConfigDict, steps: int) -> float:
        """Of steps after the first ones, by a short training."""
        workdir = self.folder / f"{name}_timed"
        if not (workdir / "metrics.jsonl").exists():
            short = config.copy_and_resolve_references()
            short.train.update(
                steps=steps, log_every=max(steps // 2, 1), checkpoint_every=steps, snapshot_every=10 * steps
            )
            train.run(FrozenConfigDict(short), workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return config.train.batch_size / json.loads(lines[-1])["images_per_second"]


def _link(folder: Path, target: Path) -> None:
    """A folder of a run that is that of others."""
    if not folder.exists():
        target.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(target.resolve())


def figures(report: Report, network: str) -> dict[str, dict]:
    """The figures in a network's features, of the only guidance scale."""
    (at_scale,) = [part for key, part in report.items() if key.startswith("guidance")]
    return at_scale[network]


def ratio(report: Report, network: str) -> tuple[float, float]:
    frechet = figures(report, network)["frechet"]
    return frechet["ratio"]["value"], frechet["ratio"]["standard_error"]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def overlap(measures: dict[str, dict]) -> list[float]:
    return [measures[name]["generated"]["mean"] for name in OVERLAP]
