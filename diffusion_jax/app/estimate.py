"""What a run costs, from numbers to a table and a verdict."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusion_jax import parallel
from diffusion_jax.app.planned import Stage
from diffusion_jax.messages import size

OK, NOT = 0, 3  # exit statuses
KEPT, WRITTEN = 2, 1  # checkpoints


class Place(NamedTuple):
    """Where a run shall take place.

    name: for people, such as "v5e-8".
    chips: their number.
    memory: of a chip, bytes.
    flops: of a chip at peak, FLOP/s.
    here: whether it is this machine.
    padded: whether the chips pad arrays, as TPUs do.
    of_host: chips of one host, which samples with them.
    """

    name: str
    chips: int
    memory: float
    flops: float
    here: bool
    padded: bool = False
    of_host: int = 1


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


class Held(NamedTuple):
    """Bytes that each chip holds in a step, without activations."""

    weights: int
    average: int
    optimizer: int
    averages: int
    frozen: int
    batch: int
    gradient: int
    accumulated: int

    @property
    def arguments(self) -> int:
        """Bytes of the step's inputs: the state, the frozen networks and the batch."""
        return sum(self[:6])

    @property
    def known(self) -> int:
        """Bytes without activations."""
        return sum(self)


def held(stage: Stage, strategy: str, place: Place) -> Held:
    """What each chip holds under a strategy."""
    state, share = stage.state, stage.batch(stage.train.batch_size // place.chips)
    others = (state.opt_state, state.step, state.key, state.bad_steps, state.bad_in_row)
    parts = (state.params, state.ema, others, state.averages, stage.frozen)
    counts = [parallel.bytes_held(part, strategy, place.chips, place.padded) for part in parts]
    gradient = counts[0]
    accumulated = gradient if stage.train.accumulate > 1 else 0
    return Held(*counts, parallel.bytes_held(share, "pmap", 1, place.padded), gradient, accumulated)


def divided(stage: Stage, place: Place) -> tuple[str, int] | None:
    """A strategy that divides the state so that the known bytes fit, and these bytes; None if there is none."""
    for chips in {parallel.group("fsdp", place.chips): None, place.chips: None}:
        need = held(stage, f"fsdp={chips}", place).known
        if chips > 1 and need <= place.memory:
            return f"fsdp={chips}", need
    return None


def hours(count: float) -> str:
    """Hours for people."""
    if count < 1 / 60:
        return "under a minute"
    return f"{count:.0f} h" if count >= 10 else f"{count:.1f} h" if count >= 0.1 else f"{60 * count:.1f} min"


def rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, how much) of a report, see `check.report`. A row with an empty second part begins a group."""
    for stage in report["stages"]:
        yield from _of_stage(stage)
    if sampling := report["sampling"]:
        yield f"sampling: {sampling['way']}", ""
        for name, held in sampling["turns"].items():
            yield f"a chip holds {name}", size(held)
        need = f"{size(sampling['need'])} of {size(sampling['memory'])}"
        yield "at once", f"{need}, activations on top: at most {sampling['room']:.0%} should be weights"
    yield "the run", ""
    for name, label in (("checkpoint", "a checkpoint"), ("averages", "averages for post-hoc lengths")):
        if report.get(name):
            yield label, size(report[name])
    if report.get("cache"):
        yield "cache of latents and texts", size(report["cache"])
    for disk in report["disks"]:
        free = f" of {size(disk['free'])} free" if disk["free"] is not None else ""
        yield f"disk for {disk['what']}", f"{size(disk['need'])}{free}"
    total = f" of {size(report['host_has'])}" if report["host_has"] else ""
    yield "memory of a host", f"{size(report['host_needs'])}{total}, libraries and the data's buffers on top"
    if records := report["records"]:
        yield "records", f"{records['count']:,}"
        yield "the source gives", f"{records['rate']:,.0f} a second on this machine (measured on {records['measured']})"
    for name, label in (("cache_hours", "to fill the cache"), ("hours", "in all")):
        if report.get(name) is not None:
            yield label, hours(report[name])
    for note in report["notes"]:
        yield "not checked", note
    for problem in report["problems"]:
        yield "wrong", problem


def _of_stage(stage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{stage['name']}, {stage['parameters'] / 1e6:.1f}M trained parameters, {stage['strategy']}", ""
    if "held" not in stage:
        return
    kept = stage["held"]
    yield "a chip holds weights", size(kept["weights"])
    yield "their average", size(kept["average"])
    yield "optimizer", size(kept["optimizer"])
    if kept["averages"]:
        yield "averages for post-hoc lengths", size(kept["averages"])
    yield "frozen networks", size(kept["frozen"])
    yield f"batch of {stage['examples']}", size(kept["batch"])
    yield "gradient", size(kept["gradient"] + kept["accumulated"])
    yield "all of these", f"{size(stage['known'])} of {size(stage['memory'])}, activations on top"
    yield "resuming, before the first step", f"{size(kept['weights'] + kept['average'] + kept['optimizer'])} of these"
    for name, label in (("compiled", "compiled step"), ("sampling", "compiled sampling")):
        if name in stage:
            yield from _of_program(label, stage[name], stage["memory"])
    if stage.get("largest"):
        yield "largest batch that fits", f"{stage['largest']} ({stage['largest'] * stage['chips']} on all chips)"
    if "flops" in stage:
        yield "a step", f"{stage['flops'] / 1e12:.3g} TFLOP, {stage['seconds']:.3g} s at {stage['utilisation']:.0%}"
        yield "it needs", f"{stage['needs']:,.0f} records a second"
        yield f"{stage['steps']} steps", f"{hours(stage['hours'])}, {stage['hours'] * stage['chips']:,.1f} chip-hours"


def _of_program(label: str, program: dict[str, Any], memory: float) -> Iterator[tuple[str, str]]:
    if program["error"]:
        yield label, f"does not fit: {program['error']}"
        return
    kinds = ", ".join(f"{name} {size(program[name])}" for name in ("arguments", "temporary", "output"))
    yield label, f"{size(program['total'])} of {size(memory)}: {kinds}"
    for name, sent in program["collectives"].items():
        yield f"{label}: {name}", f"{size(sent)} in the program, a loop's body counted once"


def verdict(report: dict[str, Any]) -> tuple[str, int]:
    """The last line and the exit status, which is that of the training."""
    line, status = _of_training(report)
    return f"{line}; sampling: {report['sampling']['way']}" if report["sampling"] else line, status


def _of_training(report: dict[str, Any]) -> tuple[str, int]:
    short = [text for stage in report["stages"] if (text := _excess(stage))]
    rooms = [("the host", report["host_needs"], report["host_has"])]
    if report["here"]:
        rooms += [(f"disk for {disk['what']}", disk["need"], disk["free"]) for disk in report["disks"]]
    short += [f"{what}, {size(need)} of {size(room)}" for what, need, room in rooms if room is not None and need > room]
    if short:
        return f"does not fit: {'; '.join(short)}", NOT
    if report["problems"]:
        return f"does not work: {report['problems'][0]}", NOT
    return f"{_fitting(report)}{_time(report)}", OK


def _excess(stage: dict[str, Any]) -> str:
    """What is too large in a stage, "" if nothing is known to be."""
    for name, label in (("compiled", stage["name"]), ("sampling", "sampling")):
        program = stage.get(name)
        if program and (program["error"] or program["total"] > stage["memory"]):
            got = program["error"] or f"{size(program['total'])} of {size(stage['memory'])}"
            return f"{label}, {got}{_advice(stage)}"
    if stage.get("known", 0) <= stage["memory"]:
        return ""
    return f"{stage['name']}, {size(stage['known'])} of {size(stage['memory'])} without activations{_advice(stage)}"


def _advice(stage: dict[str, Any]) -> str:
    advice = []
    if stage["divided"] and not stage["strategy"].startswith("fsdp"):
        advice.append(f"{stage['divided'][0]} needs {size(stage['divided'][1])} and activations")
    if stage.get("largest"):
        advice.append(f"batch {stage['largest'] * stage['chips']} fits")
    return f"; {', or '.join(advice)}" if advice else "; it takes more or larger chips"


def _fitting(report: dict[str, Any]) -> str:
    largest = max(report["stages"], key=lambda stage: stage.get("compiled", {}).get("total", stage["known"]))
    memory = size(largest["memory"])
    if "compiled" in largest:
        return f"fits: {size(largest['compiled']['total'])} of {memory} a chip"
    return f"state fits: {size(largest['known'])} of {memory} a chip, and --compile says what activations take"


def _time(report: dict[str, Any]) -> str:
    if report.get("hours") is None:
        return ""
    slow = "; the source is slower than the step" if report["source_is_slower"] else ""
    return f"; {hours(report['hours'])} on {report['place']} at {report['utilisation']:.0%}{slow}"
