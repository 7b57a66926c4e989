"""Print a line of JSON for each stage of the presets that the headers tell of and each strategy.

It has the preset, the strategy, and the bytes of a step's arguments on one of eight devices, as the check counts them
and as the compiler does.

python -m tests.app.argument_bytes PLATFORM [PRESET...]
PLATFORM: cpu, of this machine, or tpu, without one.
The program that is compiled has the arguments of the step, placed as the strategy places them, and computes nothing.
"""

import json
import sys
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from diffusion_jax import parallel
from diffusion_jax.app import check, estimate
from diffusion_jax.app.estimate import Place
from tests.app import presets

COUNT = 8


def nothing(state, frozen, batch):
    """A step that returns a number of each argument, so that the compiler leaves none out."""
    return state, [leaf.reshape(-1)[:1] for leaf in jax.tree.leaves((frozen, batch))]


def print_bytes(words: str, platform: str, devices: list) -> None:
    config, workdir = presets.config_of(words), Path("/nowhere")
    config.train.batch_size = max(config.train.batch_size, COUNT)
    config = FrozenConfigDict(config)
    model = check.model_of(config, workdir)
    for stage in [make() for make in check.stages_of(config, workdir, model, several=False)]:
        for name in ("pmap", "fsdp"):
            strategy, place = parallel.strategy(name, devices), Place("", COUNT, 0, 0, False, platform == "tpu")
            batch = strategy.batch_shapes(stage.batch(stage.train.batch_size))
            shapes = *strategy.shapes((stage.state, stage.frozen)), batch
            program = strategy.compile(nothing).lower(*shapes).compile()
            counted = estimate.held(stage, name, place).arguments
            compiled = program.memory_analysis().argument_size_in_bytes
            print(json.dumps([words, name, counted, compiled]), flush=True)


def main() -> None:
    platform, *chosen = sys.argv[1:]
    devices = parallel.slice_devices("v5e:2x4") if platform == "tpu" else jax.devices()
    for words in chosen or [row.words for row in presets.ROWS]:
        print_bytes(words, platform, devices)


if __name__ == "__main__":
    main()
