"""The names of samplers and schedulers in AUTOMATIC1111's web UI and its clients -> our solvers and spacings."""

import difflib
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
SAME_SAMPLERS = {  # its other names for the same method; a name that ends in _gpu says where its noise is made
    "LMSD": "lms",
    "PNDM": "plms",
    "DPM++ 2M SDE GPU": "dpmpp_2m_sde",
    "DPM++ SDE GPU": "dpmpp_sde",
}
NEAREST_SAMPLERS = {  # its other names -> the nearest solver: of the same order, with noise or without
    "DPM2": "dpm_solver",
    "DPM2 a": "dpmpp_sde",
    "DPM fast": "dpm_solver",
    "DPM ad": "dpm_solver",
    "DPM adaptive": "dpm_solver",
    "DPM++ 2S a": "dpmpp_sde",
    "DPM++ 2S a CFG++": "dpmpp_sde",
    "DPM++ 2S a RF": "dpmpp_sde",
    "[Forge] Flux Realistic": "dpmpp_sde",  # its name of the one before
    "[Forge] Flux Realistic (Slow)": "dpmpp_sde",
    "[Forge] Flux Realistic (2x Slow)": "dpmpp_sde",
    "DPM++ 2M CFG++": "dpmpp_2m",
    "DPM++ 3M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE GPU": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun GPU": "dpmpp_2m_sde",
    "DDIM CFG++": "ddim",
    "Euler CFG++": "euler",
    "Euler a CFG++": "euler_ancestral",
    "ER SDE": "dpmpp_2m_sde",
    "Exp Heun 2 x0": "heun",
    "Exp Heun 2 x0 SDE": "dpmpp_sde",
    "Gradient Estimation": "dpmpp_2m",
    "Gradient Estimation CFG++": "dpmpp_2m",
    "HeunPP2": "heun",
    "IPNDM": "plms",
    "IPNDM V": "plms",
    "KDPM2": "dpm_solver",
    "KDPM2 a": "dpmpp_sde",
    "Res Multistep": "dpmpp_2m",
    "Res Multistep CFG++": "dpmpp_2m",
    "Res Multistep a": "dpmpp_2m_sde",
    "Res Multistep a CFG++": "dpmpp_2m_sde",
    "Restart": "heun",
    "SA Solver": "dpmpp_2m_sde",
    "SA Solver PECE": "dpmpp_2m_sde",
    "SEEDS 2": "dpmpp_sde",
    "SEEDS 3": "dpmpp_sde",
    "TCD": "consistency",
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
    "SGM": "trailing",
    "Polyexponential": "logsnr",  # with its default rho of 1
    "DDIM Uniform": "leading",
    "ka": "karras",
    "exp": "logsnr",
}
NEAREST_SCHEDULERS = {  # its other names -> the nearest spacing
    "KL Optimal": "logsnr",
    "Align Your Steps": "karras",
    "Align Your Steps GITS": "karras",
    "Align Your Steps 11": "karras",
    "Align Your Steps 32": "karras",
    "AYS": "karras",
    "AYS GITS": "karras",
    "AYS 11": "karras",
    "AYS 32": "karras",
    "Beta": "trailing",
    "Turbo": "trailing",
    "Linear Quadratic": "quadratic",
}


def _key(name: str) -> str:
    """The name without what its spellings differ in: "DPM++ 2M SDE" and "k_dpmpp_2m_sde" are one."""
    name = name.lower().removeprefix("k_").replace("++", "pp").replace("ancestral", "a")
    return re.sub(r"[^a-z0-9]", "", name)


def _table(*tables: Mapping[str, str]) -> dict[str, str]:
    return {_key(name): ours for table in tables for name, ours in table.items()}


def _labels(table: Mapping[str, str]) -> dict[str, str]:
    return {label: ours for ours, label in table.items()} | {ours: ours for ours in table}


EXACT = _table(_labels(SAMPLERS), SAME_SAMPLERS)
KNOWN = _table(NEAREST_SAMPLERS) | EXACT
EXACT_SCHEDULERS = _table(_labels(SCHEDULERS), SAME_SCHEDULERS)
KNOWN_SCHEDULERS = _table(NEAREST_SCHEDULERS) | EXACT_SCHEDULERS
NAMES = {_key(name): name for name in (*NEAREST_SAMPLERS, *SAME_SAMPLERS, *SAMPLERS.values())}
SCHEDULER_NAMES = {_key(name): name for name in (*NEAREST_SCHEDULERS, *SAME_SCHEDULERS, *SCHEDULERS.values())}


def _unknown(kind: str, name: str, names: Mapping[str, str]) -> str:
    """The message for an unknown name, with those that are close to it."""
    close = [names[key] for key in difflib.get_close_matches(_key(name[:40]), names)]
    about = f" (close: {', '.join(close)})" if close else ""
    return f"unknown {kind} {name[:40]!r}{about}; /sdapi/v1/{kind}s has the known ones"


def sampler(name: str, solvers: Sequence[str], default: str) -> tuple[str, str, list[str]]:
    """(solver, spacing, notes) of a sampler's name, which may end in a scheduler's.

    spacing: of a name such as "DPM++ 2M Karras", else "".
    notes: what to say if it is not that sampler itself.
    solvers, default: those of the model, and the one that stands for what it lacks.
    Raises ValueError for an unknown name.
    """
    if name in solvers:
        return name, "", []
    key = _key(name)
    # the longest first: "Euler a" is no Euler, but "Euler AYS" is
    parts = ((key[:end], key[end:]) for end in range(len(key), 0, -1))
    known = [(method, steps) for method, steps in parts if method in KNOWN and steps in KNOWN_SCHEDULERS]
    if not known:
        raise ValueError(_unknown("sampler", name, NAMES))
    method, steps = known[0]
    solver, spacing = KNOWN[method] if KNOWN[method] in solvers else default, KNOWN_SCHEDULERS[steps]
    if EXACT.get(method) == solver and steps in EXACT_SCHEDULERS:
        return solver, spacing, []
    nearest = f"{SAMPLERS.get(solver, solver)} {SCHEDULERS[spacing] if spacing else ''}".strip()
    return solver, spacing, [f"sampler {name}: drawn with the nearest, {nearest}"]


def scheduler(name: str, spacings: Sequence[str]) -> tuple[str, list[str]]:
    """(spacing, notes) of a scheduler's name, as `sampler`."""
    if name in spacings:
        return name, []
    key = _key(name)
    if key not in KNOWN_SCHEDULERS:
        raise ValueError(_unknown("scheduler", name, SCHEDULER_NAMES))
    spacing = KNOWN_SCHEDULERS[key]
    is_exact = key in EXACT_SCHEDULERS
    return spacing, [] if is_exact else [f"scheduler {name}: drawn with the nearest, {SCHEDULERS[spacing]}"]
