"""--mode=check: say whether a run will fit, work and end, and what it costs, without starting it."""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax import build, chips, compilation, messages, parallel, paths
from diffusion_jax.app import account, estimate, first_stage, planned, sample, train
from diffusion_jax.app.estimate import Options, Place
from diffusion_jax.app.planned import Stage
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.build import agreement, encoders, records, weights
from diffusion_jax.data.sources import Source
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.training.loop import check_division, check_resumed

SIDE = 2048  # of the matrices whose product measures the peak of a processor that is in no table
ERRORS = (ValueError, OSError, ModuleNotFoundError)  # what stops a training before its first step


def run(config: ConfigDict, workdir: Path, options: Options) -> int:
    """Print what the run that a config describes takes and needs. Returns the exit status: 0, or 3 if it does not fit
    or does not work.
    """
    if options.compile and options.topology and _backend(options.topology) != "tpu":
        raise ValueError("--compile for GPUs needs a machine with them, and no --topology there")
    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # nothing is run, and this machine need not have the chips
        jax.config.update("jax_enable_compilation_cache", False)  # it cannot read a program of such chips
    if options.effort:
        jax.config.update("jax_optimization_level", options.effort)
    found = report(config, workdir, options)
    line, status = estimate.verdict(found)
    if options.json:
        print(messages.as_json(found | {"verdict": line, "status": status}, indent=2))
        return status
    table = list(estimate.rows(found))
    width = max(len(what) for what, _ in table)
    for what, much in table:
        print(f"  {what:<{width}}  {much}" if much else f"{what}:")
    print(line)
    return status


def place_of(topology: str) -> Place:
    """The slice of a name such as v5e:2x4, or this machine. Raises ValueError for a name that is none."""
    if not topology:
        machine = parallel.machine()
        chip = chips.of_kind(machine.kind)
        name = f"{machine.count} x {machine.kind}"
        peak = chip.flops if chip else measured_flops() / machine.count
        padded, of_host = machine.kind.startswith("TPU"), parallel.divisible(1)
        return Place(name, machine.count, machine.memory, peak, here=True, padded=padded, of_host=of_host)
    kind, _, shape = topology.partition(":")
    if kind not in chips.CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology: expected {', '.join(chips.CHIPS)} and the shape of a slice, such as v5e:2x4; got {topology!r}"
        )
    count, chip = math.prod(int(side) for side in shape.split("x")), chips.CHIPS[kind]
    padded, of_host = kind.startswith("v"), chips.of_host(kind, count)
    return Place(f"{kind}-{count}", count, chip.memory, chip.flops, here=False, padded=padded, of_host=of_host)


def measured_flops() -> float:
    """FLOP/s of a product of large float32 matrices on this machine's default device."""
    matrix = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()  # compiles

    def seconds() -> float:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - start

    return 2 * SIDE**3 / min(seconds() for _ in range(3))


def report(config: ConfigDict, workdir: Path, options: Options) -> dict[str, Any]:
    """All that is known about the run, as numbers and texts: what `estimate` makes a table and a verdict of."""
    place, wrong, absent = place_of(options.topology), [], []
    with compilation.planned_for(_backend(options.topology), place.chips), parallel.on_host():
        model = _tried(wrong, lambda: model_of(config, workdir))
        split, side = ("train", max(model.size)) if model else ("first_stage", config.data.size)
        source = _tried(absent, lambda: build.data.source(config, split, side, prepare=False))
        several = source is not None and train.has_several_captions(source)
        stages = [stage for make in stages_of(config, workdir, model, several) if (stage := _tried(wrong, make))]
        for attempt in _agreements(config, workdir, model, stages, place):
            _tried(wrong, attempt)
        for attempt in _conditions_here(config, workdir, model, source, stages):
            _tried(absent, attempt)
        sampling = _tried(wrong, lambda: _sampling(config, place)) if "checkpoint" in config else None
        records = _tried(absent, lambda: account.records(config, model, source)) if source else None
        described = [account.described(stage, workdir, config, place, options) for stage in stages]
        if options.compile and not wrong:
            devices = parallel.slice_devices(options.topology) if options.topology else None
            for stage, of_stage in zip(stages, described, strict=True):
                of_stage |= account.compiled(stage, config, devices, options)
        sizes = account.memory_and_disks(stages, workdir, config, model, place, records, described)
        share = sizes["cache_left"] / max(sizes["cache"], 1)
        hours = account.time_of(config, model, described, records, place, options, share)
    return {
        "place": place.name,
        "here": place.here,
        "utilisation": options.utilisation,
        "stages": described,
        "sampling": sampling,
        "problems": wrong + (absent if place.here else []),
        "notes": [] if place.here else absent,
        "records": records,
        **sizes,
        **hours,
    }


def _backend(topology: str) -> str:
    """That of a slice, or of this machine."""
    return "tpu" if re.match(r"v\d", topology) else "gpu" if topology else compilation.backend()


def _tried(errors: list[str], action: Callable[[], Any]) -> Any:
    """What the action returns; None, with a line in `errors`, if it raises what would stop a training."""
    try:
        return action()
    except ERRORS as error:
        if (text := messages.one_line(error)) not in errors:
            errors.append(text)
        return None


def model_of(config: ConfigDict, workdir: Path) -> DiffusionModel | None:
    """The model that a config trains; None if that is an autoencoder alone. Its weights may be shapes."""
    if not build.model.has_denoiser(config):
        return None
    if "checkpoint" in config:
        return build.model.described_model(config)
    return weights.model_of_run(config, workdir, training=True)[1]


def _sampling(config: ConfigDict, place: Place) -> dict[str, Any]:
    return account.sampling(config, build.model.described_model(config, training=False), place)


def _lacks_weights(config: ConfigDict) -> bool:
    """Whether the config names a published checkpoint that is not here."""
    return "checkpoint" in config and not paths.at(config.checkpoint).exists()


def stages_of(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, several: bool
) -> Iterator[Callable[[], Stage]]:
    """What makes the trainings that are still to do."""
    if not build.model.has_denoiser(config) or (
        first_stage.is_missing(config, workdir) and first_stage.is_trained_here(config)
    ):
        yield lambda: planned.first_stage(config)
    if model:
        yield lambda: planned.denoiser(config, model, several)


def _agreements(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, stages: list[Stage], place: Place
) -> Iterator[Callable[[], Any]]:
    """What must hold wherever the run takes place."""
    for stage in stages:
        yield functools.partial(check_division, stage.train, place.chips)
        yield functools.partial(check_resumed, account.folder_of(stage, workdir, config), stage.params)
    if model and not _lacks_weights(config):
        yield lambda: sample.check(config, model)


def _conditions_here(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, source: Source | None, stages: list[Stage]
) -> Iterator[Callable[[], Any]]:
    """What must hold on the machine of the run."""
    yield lambda: make_writable(account.nearest(workdir))
    if (
        model
        and agreement.has_text_encoders(config)
        and not account.on_disk(build.data.cache_folder(config.data, workdir))
    ):
        yield lambda: encoders.check_present(config.condition)
    if model and _lacks_weights(config):
        yield lambda: _raise(f"{config.checkpoint}: its weights are not here, only its sizes are known")
    if first_stage.is_missing(config, workdir) and not first_stage.is_trained_here(config):
        yield lambda: _raise(first_stage.NOT_NAMED)
    if source is not None:
        for stage in stages:
            yield functools.partial(records.check_records, stage.train, source)
        if model:
            yield lambda: records.check_condition(model.conditioning.null, source)
            yield lambda: build.data.by_size(config, source, model)


def _raise(message: str) -> None:
    raise FileNotFoundError(message)
