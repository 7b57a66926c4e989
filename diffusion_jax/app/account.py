"""The numbers of a run before it starts: bytes, FLOPs, records and hours."""

import contextlib
import functools
import itertools
import math
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, parallel, paths
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import estimate, planned, programs
from diffusion_jax.app.estimate import Options, Place
from diffusion_jax.app.planned import Stage
from diffusion_jax.build import weights
from diffusion_jax.data.loader import one_epoch
from diffusion_jax.data.sources import Source
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.training.checkpoints import Checkpoints, disk_space
from diffusion_jax.training.loop import check_division

MEASURED = 200  # records that are read to measure the source
LIMIT = 4096  # examples of a chip, the largest batch that is tried


def records(config: ConfigDict, model: DiffusionModel | None, source: Source) -> dict[str, float]:
    """How many there are, the rate at which the source gives them cropped on this machine, in records a second, and
    how many were read to measure it. Raises ValueError for a source without a good record.
    """
    size = model.size if model else (config.data.size, config.data.size)
    transform = build.data.variants(config, size) if has_cache(model) else build.data.transform(config, size)
    count = min(MEASURED, len(source))
    batch = max(1, count // 10)
    start = time.perf_counter()
    with contextlib.closing(one_epoch(source, batch, transform, config.seed)) as batches:
        read = sum(len(record["image"]) for record in itertools.islice(batches, count // batch))
        seconds = time.perf_counter() - start
    return {"count": len(source), "rate": read / seconds, "measured": read}


def has_cache(model: DiffusionModel | None) -> bool:
    """Whether outputs of frozen networks are computed once before the training. None is an autoencoder alone."""
    return model is not None and model.is_cached


def described(stage: Stage, workdir: Path, config: ConfigDict, place: Place, options: Options) -> dict[str, Any]:
    """A stage in numbers."""
    section = stage.train
    done = Checkpoints(folder_of(stage, workdir, config) / "checkpoints").latest_step() or 0
    found = {
        "name": stage.name,
        "strategy": section.parallel,
        "from_cache": has_cache(stage.model),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(stage.params)),
        "chips": place.chips,
        "memory": place.memory,
        "steps": max(section.steps - done, 0),
        "done": done,
        "utilisation": options.utilisation,
    }
    try:
        check_division(section, place.chips)
    except ValueError:  # is among the problems
        return found
    kept = estimate.held(stage, section.parallel, place)
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


def sampling(config: ConfigDict, model: DiffusionModel, place: Place) -> dict[str, Any]:
    """The first way that fits a host of the place: the whole published model on each chip, its networks in turns, or
    the weights divided over the host's chips, which then hold all networks. Activations are not counted, but have room.

    model: with the weights, or their shapes, that sampling has.
    """
    room, in_turns = build.sampling.ROOM, config.sample.in_turns
    alone = [(1, False), (1, True)] if in_turns is None else [(1, in_turns)]
    divided = [(place.of_host, False)]
    for chips, in_turns in divided if config.train.parallel != "pmap" else alone + divided * (place.of_host > 1):
        turns = model.turns(chips, place.padded)
        need = max(turns.values()) if in_turns else sum(turns.values())
        if fits := need <= room * place.memory:
            break
    way = "in turns" if in_turns else f"divided by {chips}" if chips > 1 else "fits whole"
    found = {"way": way if fits else "does not fit", "turns": turns, "need": need}
    return found | {"memory": place.memory, "room": room}


def compiled(stage: Stage, config: ConfigDict, devices: list | None, options: Options) -> dict[str, Any]:
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
    if stage.model:
        host = parallel.of_one_host(devices)
        run, *arrays = planned.sampling_of(config, stage.model, len(host))
        shapes = parallel.sampling_shapes(*arrays, stage.train.parallel, host)
        found["sampling"] = cost(jax.jit(run).lower(*shapes))
    return found


def memory_and_disks(
    stages: list[Stage],
    workdir: Path,
    config: ConfigDict,
    model: DiffusionModel | None,
    place: Place,
    records: dict | None,
    described: list[dict],
) -> dict[str, Any]:
    """Checkpoints, caches and the host's memory, in bytes, and what the disks have."""
    checkpoints = [disk_space(stage.state) for stage in stages]
    averages = sum(
        len(stage.state.averages) * _bytes(stage.params) // 2 * (stage.train.steps // stage.train.checkpoint_every)
        for stage in stages
    )
    need = estimate.KEPT * sum(checkpoints) + max(checkpoints, default=0) + averages
    folders = [folder_of(stage, workdir, config) / "checkpoints" for stage in stages]
    disks = [_disk("checkpoints", workdir, need, sum(map(on_disk, folders)))]
    found = {"checkpoint": max(checkpoints, default=0), "averages": averages, "cache": 0, "cache_left": 0}
    if records and has_cache(model):
        folder = build.data.cache_folder(config.data, workdir)
        found["cache"] = records["count"] * _cached_bytes(config, model, stages[-1])
        disks.append(_disk("the cache", folder, found["cache"], on_disk(folder)))
        found["cache_left"] = disks[1]["need"]
        if not paths.in_bucket(workdir) and nearest(folder).stat().st_dev == nearest(workdir).stat().st_dev:
            disks = [disks[0] | {"what": "checkpoints and the cache", "need": disks[0]["need"] + disks[1]["need"]}]
    host = [_bytes((stage.params, stage.frozen)) + _bytes(stage.state) for stage in stages]
    if place.here and place.memory == parallel.host_memory():  # its processors are the devices
        host = [own + place.chips * stage.get("known", 0) for own, stage in zip(host, described, strict=True)]
    return found | {
        "disks": disks,
        "host_needs": max(host, default=0),
        "host_has": parallel.host_memory() if place.here else None,
    }


def _disk(what: str, folder: Path, need: int, there: int) -> dict[str, Any]:
    """What is still to be written, and the room for it. A bucket has no end."""
    free = paths.free_space(nearest(folder))
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


def time_of(
    config: ConfigDict,
    model: DiffusionModel | None,
    described: list[dict],
    records: dict | None,
    place: Place,
    options: Options,
    share: float,
) -> dict[str, Any]:
    """Hours of the stages, and of the share of the cache that is left. Nothing if FLOPs were not counted."""
    if not described or any("flops" not in stage for stage in described):
        return {"hours": None, "cache_hours": None, "source_is_slower": False}
    rate = records["rate"] if records and place.here else math.inf
    slower = False
    for stage in described:
        slowed = 1 if stage["from_cache"] else max(1, stage["needs"] / rate)
        slower |= slowed > 1
        stage["hours"] = stage["steps"] * stage["seconds"] * slowed / 3600
    cache_hours = None
    if records and has_cache(model):
        flops = planned.encoder_flops(model) * _versions(config) / (place.chips * place.flops * options.utilisation)
        cache_hours = share * records["count"] * max(flops, 1 / rate) / 3600
    hours = sum(stage["hours"] for stage in described) + (cache_hours or 0)
    return {"hours": hours, "cache_hours": cache_hours, "source_is_slower": slower}


def folder_of(stage: Stage, workdir: Path, config: ConfigDict) -> Path:
    """Where a stage has its checkpoints."""
    own = stage.model is not None or not build.model.has_denoiser(config)
    return workdir if own else weights.first_stage_folder(workdir)


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    if paths.in_bucket(folder):
        return folder
    return next(above for above in (folder, *paths.absolute(folder).parents) if above.exists())


def on_disk(folder: Path) -> int:
    """Bytes of the files in a local folder."""
    if paths.in_bucket(folder) or not folder.exists():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
