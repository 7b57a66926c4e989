"""Train the diffusion model that a config describes, and sample from it.

diffusion_jax --config=configs/latent_cfg.py --mode=train
diffusion_jax --config=configs/latent_cfg.py --mode=sample --prompt "a red apple; a kitty"
"""

import importlib
import logging as std_logging
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import FrozenConfigDict, config_flags

from diffusion_jax import chips, hosts, paths
from diffusion_jax.build import fields, shipped
from diffusion_jax.build.flags import parse_flags
from diffusion_jax.compilation import configure
from diffusion_jax.messages import first_line, one_line
from diffusion_jax.training.endings import Diverged, Stopped
from diffusion_jax.training.tracing import wanted

INTERRUPTED = 130
MODES = {  # the module of each; only that of the mode is imported, because the libraries of all modes take seconds
    "train": "diffusion_jax.app.train",
    "sample": "diffusion_jax.app.sample",
    "eval": "diffusion_jax.app.evaluate",
    "export": "diffusion_jax.app.export",
    "serve": "diffusion_jax.serve",
    "check": "diffusion_jax.app.check",
}
OF_SEVERAL_HOSTS = ("train", "eval")

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:PRESET; --config.FIELD=VALUE changes it.")
_MODE = flags.DEFINE_string("mode", None, f"One of: {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "For checkpoints, logs and samples; by default runs/<config name>.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Several hosts, each running this line: TPU slices, Slurm, MPI. By default if TPU_WORKER_HOSTNAMES lists several, "
    "and in Slurm steps of several tasks.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of host 0, for hosts without such a cluster.")
_PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: the number of hosts.")
_PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: the number of this host, from 0.")
_PROMPT = flags.DEFINE_string("prompt", None, 'What to generate, "a; b" or "@FILE", instead of config.sample.prompts.')
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "STEP:COUNT, with --mode=train: trace COUNT steps from STEP on, into WORKDIR/profile. SIGUSR1 traces the next "
    "COUNT steps, or 5.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"check: the slice of the run, {', '.join(chips.CHIPS)} and its shape: v5e:2x4, h100:8; else here."
)
_HOURS = flags.DEFINE_bool("hours", True, "check: count the FLOPs of a step, for the hours of the run.")
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "check: assumed share of the chips' peak.", lower_bound=1e-3)
_COMPILE = flags.DEFINE_bool("compile", False, "check: compile the steps of training and sampling, for their memory.")
_LARGEST = flags.DEFINE_bool(
    "largest", False, "check: with --compile, look for the largest batch by compiling several."
)
_EFFORT = flags.DEFINE_enum("effort", None, ["O0", "O1", "O2", "O3"], "check: of the compiler; O0 is the fastest.")
_JSON = flags.DEFINE_bool("json", False, "check: print the report as JSON.")


def main(_: list[str]) -> int:
    _quiet_libraries()
    config = _CONFIG.value
    if config is None:
        raise ValueError("--config is missing: name a file, e.g. --config=configs/latent_cfg.py")
    default_workdir = Path("runs") / config.name  # raises if the config file cannot be read
    if _MODE.value not in MODES:
        raise ValueError(f"unknown mode {_MODE.value!r}; known: {', '.join(MODES)}")
    if _PROMPT.value is not None:
        config = config.copy_and_resolve_references()
        config.sample.prompts = _prompts(_PROMPT.value)
    options = {} if _PROFILE.value is None else {"traces": wanted(_PROFILE.value)}
    if options and _MODE.value != "train":
        raise ValueError(f"--profile traces steps of --mode=train: leave it out with --mode={_MODE.value}")
    fields.check(config)
    configure(low_memory=_MODE.value != "train")
    _connect(_MODE.value)
    if _MODE.value == "check":
        options["options"] = _check_options()
    run_mode = importlib.import_module(MODES[_MODE.value]).run
    status = run_mode(FrozenConfigDict(config), paths.at(_WORKDIR.value or default_workdir), **options) or 0
    hosts.finish(status)
    return status


def _check_options() -> tuple:
    from diffusion_jax.app.estimate import Options  # imported late, see MODES

    return Options(
        _TOPOLOGY.value,
        _HOURS.value,
        _UTILISATION.value,
        _COMPILE.value,
        _LARGEST.value,
        _EFFORT.value or "",
        _JSON.value,
    )


def _connect(mode: str) -> None:
    """Find the other hosts, if this is one of several. Raises ValueError if the mode runs on one host."""
    place = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if mode in OF_SEVERAL_HOSTS:
        hosts.connect(_DISTRIBUTED.value, *place, stop_together=mode == "train")
        if jax.process_count() > 1 and not hosts.several():
            raise ValueError(
                f"this host is one of {jax.process_count()} of a slice, and its environment does not list them: give "
                "--distributed on every host"
            )
    elif _DISTRIBUTED.value or any(value is not None for value in place):
        raise ValueError(
            f"--mode={mode} runs on one host: leave out --distributed, --coordinator, --processes and --process"
        )


def _show_flags_in_help() -> None:
    """Show this module's flags and examples in --help, which shows only those of the main file by itself."""
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    main_module = sys.modules["__main__"]
    main_module.__doc__ = main_module.__doc__ or __doc__


def _quiet_libraries() -> None:
    """Show this project's messages as plain lines, and only warnings of other libraries."""
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(message)s"))
    handler.addFilter(
        lambda record: record.levelno > std_logging.INFO or shipped.PACKAGE in Path(record.pathname).parents
    )


def _prompts(flag: str) -> tuple[str, ...]:
    """The prompts of --prompt: the lines of a file, or text split at semicolons."""
    lines = _lines(paths.local(flag[1:], "--prompt")) if flag.startswith("@") else flag.split(";")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f'--prompt is empty: expected "a; b" or a file with one prompt a line, "@FILE", got {flag!r}')
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt: expected a file of text in UTF-8, got {path} ({error})") from error


def run() -> None:
    """The program. The exit statuses are in docs/reliability.md."""
    shipped.make_importable()
    _show_flags_in_help()
    try:
        app.run(main, flags_parser=parse_flags)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        hosts.finish(hosts.AGAIN)
        sys.exit(hosts.AGAIN)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(f"error: not enough memory for these networks, images and batches: {one_line(error)}")
        if hosts.several():
            _fail(f"error: {hosts.LOST} ({first_line(error)})", hosts.AGAIN)
        raise
    except (flags.Error, ValueError, OSError, Diverged, ModuleNotFoundError) as error:
        _fail(f"error: {one_line(error)}", hosts.AGAIN if paths.is_outage(error) else hosts.ERROR)
    except Exception:
        if hosts.several():
            _fail(traceback.format_exc(), status=1)
        raise


def _fail(message: str, status: int = hosts.ERROR) -> NoReturn:
    """Print the message and exit. One host of several does not wait for the others: they may be waiting for it."""
    if hosts.several():
        hosts.leave(status, message)
    print(message, file=sys.stderr)
    sys.exit(status)
