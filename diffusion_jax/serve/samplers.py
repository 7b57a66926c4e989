"""The names of samplers and schedulers in AUTOMATIC1111's web UI and its clients -> our solvers and spacings."""

import re
from collections.abc import Mapping, Sequence

SAMPLERS = {  # solver -> its name in the web UI
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_solver": "DPM-Solver",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lms": "LMS",
    "plms": "PLMS",
    "consistency": "LCM",
}
NEAREST_SAMPLERS = {  # its other names -> the nearest solver: of the same order, with noise or without
    "DPM2": "dpm_solver",
    "DPM2 a": "dpmpp_sde",
    "DPM fast": "dpm_solver",
    "DPM ad": "dpm_solver",
    "DPM adaptive": "dpm_solver",
    "DPM++ 2S a": "dpmpp_sde",
    "DPM++ 3M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde",
    "DDIM CFG++": "ddim",
    "Restart": "heun",
    "HeunPP2": "heun",
    "IPNDM": "plms",
    "IPNDM V": "plms",
    "UniPC BH2": "unipc",
}
SCHEDULERS = {  # spacing -> its name in the web UI
    "": "Automatic",
    "linspace": "Uniform",
    "karras": "Karras",
    "logsnr": "Exponential",
    "trailing": "SGM Uniform",
    "leading": "DDIM",
    "quadratic": "Quadratic",
}
SAME_SCHEDULERS = {  # its other names for the same spacing
    "Normal": "linspace",
    "Simple": "trailing",
    "Polyexponential": "logsnr",  # with its default rho of 1
    "DDIM Uniform": "leading",
}
NEAREST_SCHEDULERS = {  # its other names -> the nearest spacing
    "KL Optimal": "logsnr",
    "Align Your Steps": "karras",
    "Align Your Steps GITS": "karras",
    "Align Your Steps 11": "karras",
    "Align Your Steps 32": "karras",
    "Beta": "trailing",
    "Turbo": "trailing",
    "Linear Quadratic": "quadratic",
}
SUFFIXES = {"karras": "karras", "ka": "karras", "exponential": "logsnr", "exp": "logsnr"}  # of samplers' names


def _key(name: str) -> str:
    """The name without what its spellings differ in: "DPM++ 2M SDE" and "k_dpmpp_2m_sde" are one."""
    name = name.lower().removeprefix("k_").replace("++", "pp").replace("ancestral", "a")
    return re.sub(r"[^a-z0-9]", "", name)


def _table(*tables: Mapping[str, str]) -> dict[str, str]:
    return {_key(name): ours for table in tables for name, ours in table.items()}


def _labels(table: Mapping[str, str]) -> dict[str, str]:
    return {label: ours for ours, label in table.items()} | {ours: ours for ours in table}


EXACT = _table(_labels(SAMPLERS))
KNOWN = _table(NEAREST_SAMPLERS) | EXACT
EXACT_SCHEDULERS = _table(_labels(SCHEDULERS), SAME_SCHEDULERS)
KNOWN_SCHEDULERS = _table(NEAREST_SCHEDULERS) | EXACT_SCHEDULERS


def sampler(name: str, solvers: Sequence[str], default: str) -> tuple[str, str, list[str]]:
    """(solver, spacing, notes) of a sampler's name.

    spacing: of a name such as "DPM++ 2M Karras", else "".
    notes: what to say if it is not that sampler itself.
    solvers, default: those of the model, and the one that stands for what it lacks.
    Raises ValueError for an unknown name.
    """
    if name in solvers:
        return name, "", []
    key = _key(name)
    suffix = next((end for end in SUFFIXES if key not in KNOWN and key.removesuffix(end) in KNOWN), "")
    key = key.removesuffix(suffix)
    if key not in KNOWN:
        raise ValueError(f"unknown sampler {name[:40]!r}; /sdapi/v1/samplers has the known ones")
    solver = KNOWN[key] if KNOWN[key] in solvers else default
    is_exact = EXACT.get(key) == solver
    notes = [] if is_exact else [f"sampler {name}: drawn with the nearest, {SAMPLERS.get(solver, solver)}"]
    return solver, SUFFIXES.get(suffix, ""), notes


def scheduler(name: str, spacings: Sequence[str]) -> tuple[str, list[str]]:
    """(spacing, notes) of a scheduler's name, as `sampler`."""
    if name in spacings:
        return name, []
    key = _key(name)
    if key not in KNOWN_SCHEDULERS:
        raise ValueError(f"unknown scheduler {name[:40]!r}; /sdapi/v1/schedulers has the known ones")
    spacing = KNOWN_SCHEDULERS[key]
    is_exact = key in EXACT_SCHEDULERS
    return spacing, [] if is_exact else [f"scheduler {name}: drawn with the nearest, {SCHEDULERS[spacing]}"]
