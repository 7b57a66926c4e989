"""Programs compiled to be looked at: what they take, by the compiler's own account. Nothing is run."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jaxlib

from diffusion_jax import paths
from diffusion_jax.messages import first_line

FOLDER = paths.CACHE / "programs"
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", re.MULTILINE
)
ARRAY = re.compile(r"\b(?:pred|bf16|[suf](\d+))\[([\d,]*)\]")
SIZES = re.compile(r"\b([\d.]+)([KMGT])\b")  # of the TPU compiler, in powers of 1024


def cost(lowered: jax.stages.Lowered, compiler: str, effort: str) -> dict[str, Any]:
    """Bytes of a program on each device: arguments, temporary, output, total (donated memory counts once), those that
    each kind of collective sends, and `error`, why it does not fit, "" if it does.

    compiler: identifies the devices that it is compiled for.
    The answer is kept, so that the same program is compiled once.
    """
    key = "\n".join((lowered.as_text(), compiler, effort, jaxlib.__version__))
    file = FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if file.exists():
        return json.loads(file.read_text())
    result = _compiled(lowered)
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths.write(file, json.dumps(result))
    return result


def _compiled(lowered: jax.stages.Lowered) -> dict[str, Any]:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": excess(str(error)), "total": math.inf}
    memory = compiled.memory_analysis()
    arguments, temporary, output = (getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output"))
    return {
        "error": "",
        "arguments": arguments,
        "temporary": temporary,
        "output": output - memory.alias_size_in_bytes,
        "total": arguments + temporary + output - memory.alias_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
    }


def excess(message: str) -> str:
    """How much memory a program needs and the device has, from the compiler's error; else its first line."""
    sizes = [f"{number} {prefix}iB" for number, prefix in SIZES.findall(message)]
    return " of ".join(sizes[:2]) if len(sizes) > 1 else first_line(ValueError(message))


def collectives(program: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled program's text. A loop's body counts once."""
    sent: dict[str, int] = {}
    for result, name in COLLECTIVE.findall(program):
        # the result of a pair's first half may have the operand too: the largest is what arrives
        sent[name] = sent.get(name, 0) + max(map(_bytes, ARRAY.finditer(result)), default=0)
    return sent


def _bytes(array: re.Match) -> int:
    bits = int(array[1]) if array[1] else 16 if array[0].startswith("bf16") else 8
    return bits // 8 * math.prod(int(side) for side in array[2].split(",") if side)


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest number up to limit that fits, by doubling `start` and then by bisection; 0 if 1 does not fit."""
    low, high = 0, start
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
