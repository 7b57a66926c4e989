"""--mode=check: say whether a run will fit, work and end, and what it costs, without starting it."""

import contextlib
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, chips, compilation, messages, parallel, paths
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import estimate, first_stage, planned, programs, sample, train
from diffusion_jax.app.estimate import Place
from diffusion_jax.app.planned import Stage
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.build import agreement, encoders, weights
from diffusion_jax.data.loader import one_epoch
from diffusion_jax.data.sources import Source
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.training.checkpoints import Checkpoints, disk_space
from diffusion_jax.training.loop import check_division, check_resumed

MEASURED = 200  # records that are read to measure the source
SIDE = 2048  # of the matrices whose product measures the peak of a processor that is in no table
LIMIT = 4096  # examples of a chip, the largest batch that is tried
ERRORS = (ValueError, OSError, ModuleNotFoundError)  # what stops a training before its first step


class Options(NamedTuple):
    """topology: a slice, such as v5e:2x4, or a number of GPUs, such as h100:8; "" for this machine.
    hours: count the FLOPs of a step, for an estimate of the time.
    utilisation: assumed share of the chips' peak.
    compile: compile the step of training, and that of sampling.
    largest: also look for the largest batch, by compiling several.
    effort: of the compiler, O0 to O3; "" for its own choice.
    json: print the report as JSON.
    """

    topology: str = ""
    hours: bool = True
    utilisation: float = 0.4
    compile: bool = False
    largest: bool = False
    effort: str = ""
    json: bool = False


def run(config: ConfigDict, workdir: Path, options: Options) -> int:
    """Print what the run that a config describes takes and needs. Returns the exit status: 0, or 3 if it does not fit
    or does not work.
    """
    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # nothing is run, and this machine need not have the chips
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
        return Place(name, machine.count, machine.memory, peak, here=True)
    kind, _, shape = topology.partition(":")
    if kind not in chips.CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology: expected {', '.join(chips.CHIPS)} and the shape of a slice, such as v5e:2x4; got {topology!r}"
        )
    count, chip = int(np.prod([int(side) for side in shape.split("x")])), chips.CHIPS[kind]
    return Place(f"{kind}-{count}", count, chip.memory, chip.flops, here=False)


def measured_flops() -> float:
    """FLOP/s of a product of large float32 matrices on this machine's default device."""
    matrix = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return 2 * SIDE**3 / (time.perf_counter() - start)


def report(config: ConfigDict, workdir: Path, options: Options) -> dict[str, Any]:
    """All that is known about the run, as numbers and texts: what `estimate` makes a table and a verdict of."""
    place, wrong, absent = place_of(options.topology), [], []
    with compilation.planned_for(_backend(options.topology)), parallel.on_host():
        model = _tried(wrong, lambda: _model(config, workdir))
        split, side = ("train", max(model.size)) if model else ("first_stage", config.data.size)
        source = _tried(absent, lambda: build.data.source(config, split, side, prepare=False))
        several = source is not None and train.has_several_captions(source)
        stages = [stage for make in _stages(config, workdir, model, several) if (stage := _tried(wrong, make))]
        for attempt in _agreements(config, workdir, model, stages, place):
            _tried(wrong, attempt)
        for attempt in _conditions_here(config, workdir, model, source, stages):
            _tried(absent, attempt)
        records = _tried(absent, lambda: _records(config, model, source)) if source else None
        described = [_described(stage, workdir, config, place, options) for stage in stages]
        if options.compile and not wrong:
            devices = parallel.slice_devices(options.topology) if options.topology else None
            for stage, of_stage in zip(stages, described, strict=True):
                of_stage |= _compiled(stage, model, config, devices, options)
    return {
        "place": place.name,
        "here": place.here,
        "utilisation": options.utilisation,
        "stages": described,
        "problems": wrong + (absent if place.here else []),
        "notes": [] if place.here else absent,
        "records": records,
        **_memory_and_disks(stages, workdir, config, model, place, records),
        **_time(config, model, described, records, place, options),
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


def _model(config: ConfigDict, workdir: Path) -> DiffusionModel | None:
    if not build.model.has_denoiser(config):
        return None
    is_here = "checkpoint" not in config or paths.at(config.checkpoint).exists()
    if not is_here and (described := build.model.described_model(config)):
        return described
    return weights.model_of_run(config, workdir, training=True)[1]


def _stages(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, several: bool
) -> Iterator[Callable[[], Stage]]:
    """What makes the trainings that are still to do."""
    if not build.model.has_denoiser(config) or first_stage.is_missing(config, workdir):
        yield lambda: planned.first_stage(config)
    if model:
        yield lambda: planned.denoiser(config, model, several)


def _folder(stage: Stage, workdir: Path, config: ConfigDict) -> Path:
    """Where a stage has its checkpoints."""
    own = stage.name == "denoiser" or not build.model.has_denoiser(config)
    return workdir if own else weights.first_stage_folder(workdir)


def _agreements(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, stages: list[Stage], place: Place
) -> Iterator[Callable[[], Any]]:
    """What must hold wherever the run takes place."""
    for stage in stages:
        yield functools.partial(check_division, stage.train, place.chips)
        yield functools.partial(check_resumed, _folder(stage, workdir, config), stage.params)
    if model and "checkpoint" not in config:
        yield lambda: sample.request(config, model, config.sample.prompts)


def _conditions_here(
    config: ConfigDict, workdir: Path, model: DiffusionModel | None, source: Source | None, stages: list[Stage]
) -> Iterator[Callable[[], Any]]:
    """What must hold on the machine of the run."""
    yield lambda: make_writable(_nearest(workdir))
    if model and agreement.has_text_encoders(config) and not _on_disk(build.data.cache_folder(config.data, workdir)):
        yield lambda: encoders.check_present(config.condition)
    if model and "checkpoint" in config and not paths.at(config.checkpoint).exists():
        yield lambda: _raise(f"{config.checkpoint}: its weights are not here, only its sizes are known")
    if source is not None:
        for stage in stages:
            yield functools.partial(agreement.check_records, stage.train, source)
        if model:
            yield lambda: agreement.check_condition(config, source)
            yield lambda: build.data.by_size(config, source, model)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    if paths.in_bucket(folder):
        return folder
    return next(above for above in (folder, *paths.absolute(folder).parents) if above.exists())


def _on_disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _raise(message: str) -> None:
    raise FileNotFoundError(message)


def _records(config: ConfigDict, model: DiffusionModel | None, source: Source) -> dict[str, float]:
    """count, and rate: records a second that the source gives on this machine, cropped, measured on the first of them
    (`measured`). Raises ValueError if all of these are bad.
    """
    size = model.size if model else (config.data.size, config.data.size)
    transform = build.data.variants(config, size) if _has_cache(config, model) else build.data.transform(config, size)
    count = min(MEASURED, len(source))
    batch = max(1, count // 10)
    with contextlib.closing(one_epoch(source, batch, transform, config.seed)) as batches:
        next(batches)  # threads start, files are opened
        start = time.perf_counter()
        read = sum(len(jax.tree.leaves(records)[0]) for records in itertools.islice(batches, count // batch - 1))
        seconds = time.perf_counter() - start
    return {"count": len(source), "rate": (read or batch) / max(seconds, 1e-9), "measured": count}


def _has_cache(config: ConfigDict, model: DiffusionModel | None) -> bool:
    """Whether outputs of frozen networks are computed once before the training."""
    return model is not None and (
        "checkpoint" in config or model.codec.factor > 1 or agreement.has_text_encoders(config)
    )


def _described(stage: Stage, workdir: Path, config: ConfigDict, place: Place, options: Options) -> dict[str, Any]:
    """A stage in numbers."""
    section = stage.train
    done = Checkpoints(_folder(stage, workdir, config) / "checkpoints").latest_step() or 0
    found = {
        "name": stage.name,
        "strategy": section.parallel,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(stage.params)),
        "chips": place.chips,
        "memory": place.memory,
        "steps": max(section.steps - done, 0),
        "done": done,
        "utilisation": options.utilisation,
    }
    if section.batch_size % (place.chips * section.accumulate):
        return found
    kept = estimate.held(stage, section.parallel, place.chips)
    found |= {
        "examples": section.batch_size // place.chips,
        "held": kept._asdict(),
        "known": kept.known,
        "arguments": kept.arguments,
        "divided": estimate.divided(stage, place) if place.chips > 1 else None,
    }
    if options.hours:
        flops = stage.flops(place.chips)
        seconds = flops / (place.chips * place.flops * options.utilisation)
        found |= {"flops": flops, "seconds": seconds, "needs": section.batch_size / seconds}
    return found


def _compiled(
    stage: Stage, model: DiffusionModel | None, config: ConfigDict, devices: list | None, options: Options
) -> dict[str, Any]:
    """What the compiler says of a stage's step; of sampling, for a denoiser; and the largest batch, if asked for."""
    strategy = parallel.strategy(stage.train.parallel, devices)
    chips, micro = len(devices) if devices else parallel.num_devices(), stage.train.accumulate
    cost = functools.partial(programs.cost, compiler=parallel.compiler(devices), effort=options.effort)

    def train_step(examples: int) -> dict[str, Any]:
        return cost(stage.lowered(strategy, chips * micro * examples))

    start = stage.train.batch_size // (chips * micro)
    found = {"compiled": train_step(start)}
    if options.largest:
        found["largest"] = micro * programs.largest(lambda count: not train_step(count)["error"], start, LIMIT)
    if model and stage.name == "denoiser":
        planned_sampling = planned.sampling_of(config, model)
        shapes = parallel.sampling_shapes(*planned_sampling[1:], stage.train.parallel, devices)
        found["sampling"] = cost(jax.jit(planned_sampling.run).lower(*shapes))
    return found


def _memory_and_disks(
    stages: list[Stage],
    workdir: Path,
    config: ConfigDict,
    model: DiffusionModel | None,
    place: Place,
    records: dict | None,
) -> dict[str, Any]:
    """Checkpoints, caches and the host's memory, in bytes, and what the disks have."""
    checkpoints = [disk_space(stage.state) for stage in stages]
    averages = sum(
        len(stage.state.averages) * _bytes(stage.params) // 2 * (stage.train.steps // stage.train.checkpoint_every)
        for stage in stages
    )
    need = estimate.KEPT * sum(checkpoints) + max(checkpoints, default=0) + averages
    folders = [_folder(stage, workdir, config) / "checkpoints" for stage in stages]
    disks = [_disk("checkpoints", workdir, need, sum(map(_on_disk, folders)))]
    found = {"checkpoint": max(checkpoints, default=0), "averages": averages, "cache": 0}
    if records and _has_cache(config, model):
        folder = build.data.cache_folder(config.data, workdir)
        found["cache"] = records["count"] * _cached_bytes(config, model, stages[-1])
        disks.append(_disk("the cache", folder, found["cache"], _on_disk(folder)))
    host = [_bytes((stage.params, stage.frozen)) + _bytes(stage.state) for stage in stages]
    return found | {
        "disks": disks,
        "host_needs": max(host, default=0),
        "host_has": parallel.host_memory() if place.here else None,
    }


def _disk(what: str, folder: Path, need: int, there: int) -> dict[str, Any]:
    """What is still to be written, and the room for it. A bucket has no end."""
    free = paths.free_space(_nearest(folder))
    return {"what": what, "need": max(need - there, 0), "free": None if math.isinf(free) else free}


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _versions(config: ConfigDict) -> int:
    """Augmented versions of a record in the cache."""
    return (config.data.crops if config.data.random_crop else 1) * (2 if config.data.flip else 1)


def _cached_bytes(config: ConfigDict, model: DiffusionModel, stage: Stage) -> int:
    """Of a record in the cache: its versions, and its text."""
    cond = stage.example["cond"]
    sizes = {name: leaf for name, leaf in cond.items() if name == model.conditioning.sizes}
    texts = {name: leaf for name, leaf in cond.items() if name in conditionings.EMBEDDINGS or name == "mask"}
    return _versions(config) * _bytes((stage.example["latent"], sizes)) + _bytes(texts)


def _time(
    config: ConfigDict,
    model: DiffusionModel | None,
    described: list[dict],
    records: dict | None,
    place: Place,
    options: Options,
) -> dict[str, Any]:
    """Hours of the stages and of the cache. Nothing if FLOPs were not counted."""
    if not described or any("flops" not in stage for stage in described):
        return {"hours": None, "cache_hours": None, "source_is_slower": False}
    rate = records["rate"] if records and place.here else math.inf
    slower = False
    for stage in described:
        reads = stage["name"] != "denoiser" or not _has_cache(config, model)
        slower |= reads and rate < stage["needs"]
        seconds = max(stage["seconds"], stage["needs"] * stage["seconds"] / rate) if reads else stage["seconds"]
        stage["hours"] = stage["steps"] * seconds / 3600
    cache_hours = None
    if records and _has_cache(config, model):
        flops = planned.encoder_flops(model) * _versions(config) / (place.chips * place.flops * options.utilisation)
        cache_hours = records["count"] * max(flops, 1 / rate) / 3600
    hours = sum(stage["hours"] for stage in described) + (cache_hours or 0)
    return {"hours": hours, "cache_hours": cache_hours, "source_is_slower": slower}
