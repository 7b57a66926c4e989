"""Maps of a network's original code in terms of ours: other names, several maps in one, and rows in another order."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Some rows of a map: these parts of `count` equal parts, one after the other."""

    count: int = 1
    parts: tuple[int, ...] = (0,)

    def of(self, tensor: Any) -> Any:
        """These rows of an array (rows, …); a view of them if they are one part.

        Raises ValueError if its rows cannot be divided.
        """
        if self == WHOLE:
            return tensor
        rows = tensor.shape[0] if tensor.shape else 0
        if not rows or rows % self.count:
            raise ValueError(f"has the shape {tensor.shape}, expected a multiple of {self.count} rows")
        size = rows // self.count
        parts = [tensor[part * size : (part + 1) * size] for part in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part) for part in parts])


WHOLE = Rows()
EXCHANGED = Rows(2, (1, 0))
Places = Mapping[str, Rows]  # path of a map of ours -> its rows in a map of the file


def fused(*paths: str) -> Places:
    """The maps that are one map in the original, of equal sizes."""
    return {path: Rows(len(paths), (part,)) for part, path in enumerate(paths)}


def by_table(table: Mapping[str, str | Places]) -> Callable[[str], Places]:
    """path -> places. A path that the table does not have is left as it is.

    table: path of the original code, with dots -> path of ours, or places. A * is any number. The paths that are looked
      up may have underscores instead of dots, as in files of LoRA.
    """
    rules = [
        (
            re.compile(re.escape(path).replace(r"\.", "[._]").replace(r"\*", r"(\d+)")),
            {places: WHOLE} if isinstance(places, str) else places,
        )
        for path, places in table.items()
    ]

    def places_of(path: str) -> Places:
        for pattern, places in rules:
            if match := pattern.fullmatch(path):
                return {name.replace("*", "".join(match.groups())): rows for name, rows in places.items()}
        return {path: WHOLE}

    return places_of


def renamed(tensors: Mapping[str, Any], places_of: Callable[[str], Places]) -> dict[str, Any]:
    """The tensors under our names.

    places_of: path of a map -> its places.
    Raises ValueError for a tensor whose rows cannot be divided, for two tensors of one name, and as `places_of` does.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            for place, rows in places_of(path).items():
                new_name = f"{place}.{'weight' if leaf == 'scale' else leaf}" if path else name
                if new_name in found:
                    raise ValueError(f"is {new_name} in another spelling, which the file has too")
                found[new_name] = rows.of(tensor)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return found


def length_of(tensors: Mapping[str, Any], prefix: str) -> int:
    """The number of different name parts after `prefix`: the length of a list of modules."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
