"""A file imports only from its own folder or from a lower layer, and each library has its place."""

import ast
import sys
from pathlib import Path

import pytest

import diffusion_jax

ROOT = Path(diffusion_jax.__file__).parent
LAYERS = [  # from the ground up, as in docs/design.md
    ("core", "paths", "messages", "compilation", "flops", "chips"),
    ("data", "models", "parallel", "gathering", "hosts", "pictures", "stored"),
    ("interop", "model", "codec", "conditioning"),
    ("objectives", "pipelines", "training", "evaluation"),
    ("build",),
    ("serve",),
    ("app",),
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "flax": ("models",),
    "optax": ("training", "build"),
    "orbax": ("training",),
    "grain": ("data",),
    **dict.fromkeys(("etils", "fsspec", "gcsfs"), ("paths",)),  # buckets
}
IN_CORE = {"jax", "numpy", "jaxtyping", "diffusion_jax", *sys.stdlib_module_names}
OF_DEVICES = {  # what places arrays or counts what they are placed on
    *("device_put", "device_put_sharded", "device_put_replicated", "default_device", "pmap", "pmean", "shard_map"),
    *("devices", "local_devices", "device_count", "local_device_count", "axis_index"),
    *("Mesh", "NamedSharding", "PartitionSpec", "SingleDeviceSharding"),
}
COUNTED_BY = {"compilation": {"local_device_count"}}  # whether programs need be divided
FILES = {str(file.relative_to(ROOT)): file.read_text() for file in sorted(ROOT.rglob("*.py"))}


def place(file: str) -> str:
    """The folder of the package that a file belongs to, or the module that it is."""
    return Path(file).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    """All that a file imports, anywhere in it, by full name."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
    return names


def may_import(importer: str, name: str) -> bool:
    """Whether a file of folder `importer` may import the name. Modules beside each other are in one folder."""
    top, _, rest = name.partition(".")
    if top != "diffusion_jax":
        return importer in ONLY_IN.get(top, [importer]) and (importer != "core" or top in IN_CORE)
    other = rest.partition(".")[0]
    beside = f"{importer}.py" in FILES and f"{other}.py" in FILES
    return (
        other == importer or LAYER_OF[other] < LAYER_OF[importer] or (beside and LAYER_OF[other] == LAYER_OF[importer])
    )


def offences(file: str, source: str) -> list[str]:
    """What a file imports or names and should not."""
    importer, tree = place(file), ast.parse(source)
    names = imported(tree)
    uses = [name.rpartition(".")[2] for name in names]
    uses += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    allowed = OF_DEVICES if importer == "parallel" else COUNTED_BY.get(importer, set())
    of_devices = [use for use in uses if use in OF_DEVICES - allowed]
    return [name for name in names if not may_import(importer, name)] + of_devices


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_a_file_keeps_to_its_layer(file):
    assert not offences(file, FILES[file])


@pytest.mark.parametrize(
    "file, source",
    [
        ("core/x.py", "from diffusion_jax.models.unet import UNet"),
        ("core/x.py", "import PIL"),
        ("data/x.py", "def f():\n    from diffusion_jax import models"),
        ("pipelines/x.py", "from diffusion_jax.training.loop import fit"),
        ("pipelines/x.py", "from flax import linen"),
        ("interop/x.py", "import diffusion_jax.codec"),
        ("messages.py", "from diffusion_jax.model import Network"),
        ("app/x.py", "import jax\njax.devices()"),
        ("training/x.py", "from jax.sharding import Mesh"),
        ("core/x.py", "from . import y"),
        ("app/x.py", "from etils import epath"),
        ("training/x.py", "import gcsfs.core"),
    ],
)
def test_the_check_sees_an_offence(file, source):
    assert offences(file, source)
