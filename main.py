"""Train, and sample from, the diffusion model that a config describes.

    python main.py --config=configs/latent_cfg.py --mode=train
    python main.py --config=configs/latent_cfg.py --mode=sample --prompt "red apple; a kitty"
"""

import logging as std_logging
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import diffusion_jax
from diffusion_jax import modes
from diffusion_jax.training.loop import Diverged, Stopped

MODES = {"train": modes.train, "sample": modes.sample, "export": modes.export}

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train or sample, e.g. configs/latent_cfg.py.")
_MODE = flags.DEFINE_string("mode", None, f"One of: {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and samples go; runs/<config name> by default.")
_PROMPT = flags.DEFINE_string("prompt", None, 'What to draw instead of the config\'s prompts, "a; b", or a file, "@FILE".')


def main(_) -> int:
    _quiet_libraries()
    config = _CONFIG.value
    if config is None:
        raise ValueError("--config is missing: name a file, e.g. --config=configs/latent_cfg.py")
    if _MODE.value not in MODES:
        raise ValueError(f"unknown mode {_MODE.value!r}; known: {', '.join(MODES)}")
    if _PROMPT.value:
        config.sample.prompts = _prompts(_PROMPT.value)
    if os.environ.get("TPU_WORKER_HOSTNAMES", "").count(","):  # one process on each host of a TPU slice
        jax.distributed.initialize()
    if jax.config.jax_compilation_cache_dir is None:  # a second start compiles nothing
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "diffusion_jax" / "xla"))
    workdir = Path(_WORKDIR.value or f"runs/{config.name}")
    MODES[_MODE.value](config, workdir)
    return 0


def _quiet_libraries() -> None:
    """Show this project's messages as plain lines; of others only warnings."""
    ours = Path(diffusion_jax.__file__).parent
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: record.levelno > std_logging.INFO or ours in Path(record.pathname).parents)


def _prompts(flag: str) -> tuple[str, ...]:
    """The prompts of --prompt: one a line of a file, or split at semicolons."""
    lines = Path(flag[1:]).read_text().splitlines() if flag.startswith("@") else flag.split(";")
    return tuple(line.strip() for line in lines if line.strip())


def run() -> None:
    """The program: errors that a user can mend are one line and exit status 2."""
    try:
        app.run(main)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    except (ValueError, OSError, Diverged, ModuleNotFoundError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
