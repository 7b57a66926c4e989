"""Pictures written to a folder of the server's machine: --config.serve.save=FOLDER."""

import re
import threading

from diffusion_jax import paths

LETTERS = 60  # of a prompt in the name of a file


def file_name(prompt: str, seed: str) -> str:
    """A name from the prompt and the seed, without its ending: "a red apple", "7" -> "a-red-apple-7"."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))[:LETTERS].strip("-")
    return f"{words or 'picture'}-{seed}"


class Album:
    """A folder of pictures. A new one never replaces another."""

    def __init__(self, folder: str):
        self.folder, self.lock = paths.at(folder), threading.Lock()
        try:
            paths.try_writing(self.folder)
        except OSError as error:
            raise ValueError(f"config.serve.save: cannot write to {folder}: {error.strerror or error}") from error

    def add(self, texts: dict[str, str], content: bytes) -> None:
        """Write a PNG. Raises OSError if it cannot be written.

        texts: its settings, with prompt and seed.
        """
        name = file_name(texts["prompt"], texts["seed"])
        with self.lock:
            file, number = self.folder / f"{name}.png", 2
            while file.exists():
                file, number = self.folder / f"{name}-{number}.png", number + 1
            paths.write(file, content)
