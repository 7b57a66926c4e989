"""The TPU compiler's estimates for a program. This needs no TPU (`pip install "jax[tpu]"`), and nothing is run.

Import this before JAX finds its devices: it then looks for no TPU.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from diffusion_jax import chips, parallel

jax.config.update("jax_platforms", "cpu")
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "v5p": 1.75e9, "v4": 1.05e9}  # the peak over twice the multipliers of a chip


class Cost(NamedTuple):
    """The cost of a compiled program, for each chip.

    arguments, temporary, total: bytes of inputs, of temporary arrays, and of all arrays; donated memory counts once.
    flops, accessed: FLOPs, and bytes read and written. The body of a loop counts once.
    cycles: the compiler's estimate. The body of a loop counts as often as it runs. Custom kernels do not count, and
      parallel operations are added up.
    """

    arguments: int
    temporary: int
    total: int
    flops: float
    accessed: float
    cycles: int


devices = parallel.slice_devices


def chip(topology: str) -> chips.Chip:
    """The performance of each chip of a slice."""
    return chips.CHIPS[topology.split(":")[0]]


def clock(topology: str) -> float:
    """Cycles a second of a chip."""
    return CLOCKS[topology.split(":")[0]]


def cost(compiled) -> Cost:
    """The compiler's own cost estimate of `jax.jit(f).lower(…).compile()`."""
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Cost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        total - memory.alias_size_in_bytes,
        counted["flops"],
        counted["bytes accessed"],
        cycles(compiled.as_text()),
    )


def is_product(line: str) -> bool:
    """Whether an operation multiplies matrices or convolves."""
    return "kind=kOutput" in line or " convolution(" in line


def is_move(line: str) -> bool:
    """Whether an operation computes nothing: it copies, pads, repeats or cuts."""
    return bool(re.search(r" (copy|pad|broadcast|slice|transpose|concatenate|reshape|convert)\(", line))


def cycles(program: str, counts: Callable[[str], bool] = lambda line: True) -> int:
    """The sum of the estimates in a compiled program's text. counts: of which operations."""
    computations, name = {}, None
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) ", line):
            name = "ENTRY" if head[1] else head[2]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def cycles_of(name: str) -> int:
        return sum(cycles_of_line(line) for line in computations.get(name, ()))

    def trips(condition: str) -> int:
        # a scan counts from 0 to the one number that its condition compares with
        (count,) = re.findall(r"constant\((\d+)\)", "".join(computations[condition])) or [1]
        return int(count)

    def cycles_of_line(line: str) -> int:
        if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
            return trips(loop[1]) * cycles_of(loop[2])
        if " conditional(" in line:
            listed = re.search(r"branch_computations={([^}]*)}", line)
            branches = listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", line))
            return max(cycles_of(branch) for branch in re.findall(r"%([\w.\-]+)", branches))
        if called := re.search(r" call\(.*to_apply=%([\w.\-]+)", line):
            return cycles_of(called[1])
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        return int(estimate[1]) if estimate and counts(line) else 0

    return cycles_of("ENTRY")
