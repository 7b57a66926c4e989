"""Conditions of prompts, kept on disk."""

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax import paths

OfPrompts = Callable[[Sequence[str]], dict[str, np.ndarray]]  # prompts -> arrays with a row for each


def kept(of_prompts: OfPrompts, folder: str | os.PathLike, key: str) -> OfPrompts:
    """The function, which computes each prompt once and keeps it as `folder`/<SHA-256 of key and prompt>.npz.

    key: all that the result depends on besides the prompt.
    """
    folder = paths.local(folder, "the folder of kept prompts")

    def of(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        files = [folder / f"{hashlib.sha256(f'{key} {prompt}'.encode()).hexdigest()}.npz" for prompt in prompts]
        missing = {file: prompt for file, prompt in zip(files, prompts, strict=True) if not file.exists()}
        if missing:
            computed = of_prompts(list(missing.values()))
            folder.mkdir(parents=True, exist_ok=True)
            for row, file in enumerate(missing):
                with paths.written(file) as unfinished, unfinished.open("wb") as opened:
                    np.savez(opened, **{name: array[row] for name, array in computed.items()})
        rows = [np.load(file) for file in files]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return of
