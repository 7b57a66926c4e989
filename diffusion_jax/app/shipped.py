"""The files that come with the program: configs/ and the demo weights, weights/latent_cfg."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "shipped"  # where pyproject.toml puts them in an installed package
ROOT = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def find(path: str | Path) -> Path:
    """The path itself if there is such a file or folder, or if none comes with the program; else the one that does."""
    return Path(path) if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


def make_importable() -> None:
    """Let config files say `from configs import common` wherever they lie."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
