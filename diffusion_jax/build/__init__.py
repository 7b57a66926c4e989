"""Config -> values. The only place where strings become functions.

A wrong value is found by building what it describes, before the work starts.

fields, ranges: what a config may contain. flags: the command line. agreement, records: whether the parts of a model
fit together, and its data. model, encoders, data, objective, sampling: what a config describes. initial, weights: what
training starts from, and trained weights. shipped: the files that come with the program.
"""

import importlib
from types import ModuleType

__all__ = ["agreement", "data", "fields", "model", "objective", "records", "sampling", "shipped", "weights"]


def __getattr__(name: str) -> ModuleType:
    """A module of this package, imported when it is first used: those of data and training need large libraries."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
