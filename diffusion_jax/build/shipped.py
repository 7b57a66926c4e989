"""The files that come with the program: configs/ and the demo weights, weights/emoji."""

import sys
from pathlib import Path

from diffusion_jax import paths

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "shipped"  # where pyproject.toml puts them in an installed package
ROOT = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def find(path: str | paths.Path) -> paths.Path:
    """The path itself if it exists, else the same path among the shipped files; the path itself if neither exists."""
    path = paths.at(path)
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


def make_importable() -> None:
    """Make `from configs import common` work in config files of any folder."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
