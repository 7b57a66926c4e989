"""The peer of distances, torch-fidelity, without the torchvision that it imports for its data sets."""

import sys
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest


def module(monkeypatch, name):
    """torch_fidelity.NAME. Skips the test if it is not installed."""
    if not (find_spec("torch") and find_spec("torch_fidelity")):
        pytest.skip("torch and torch-fidelity are not installed")
    for part in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
        monkeypatch.setitem(sys.modules, f"torchvision{part}", MagicMock())
    return import_module(f"torch_fidelity.{name}")
