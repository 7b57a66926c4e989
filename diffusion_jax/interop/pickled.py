"""Read tensors from torch's zip files (`torch.save`, since 1.6), without torch and without executing their code.

The archive has `<name>/data.pkl`, a pickled nested dict. In it each tensor is a call of torch functions on a reference
to a storage. The bytes of each storage are in a file `<name>/data/<key>`. A pickle can call any function. This reader
turns the few calls that describe tensors into plain tuples, and rejects every other call.
"""

import collections
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from diffusion_jax.messages import first_line

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _ParameterDict(dict):
    """torch's dict of parameters, without torch."""

    def __setstate__(self, state):
        self.update(state["_parameters"])


def state_dict(content: Any) -> Mapping[str, Any]:
    """The `state_dict` of an unpickled file if it has one, else all that it has."""
    return content.get("state_dict", content)


def read_pickle(path: str | Path, select: Callable[[Any], Mapping[str, Any]] = state_dict) -> dict[str, np.ndarray]:
    """The tensors of a .bin, .ckpt, .pt or .pth file by name.

    select: unpickled content -> what to read of it. Values that are no tensors are left out.
    Raises ValueError for another format, for a file with anything but tensors, and for malformed files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (program,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = program.removesuffix("data.pkl")
            if archive.namelist().count(root + "byteorder") and archive.read(root + "byteorder") != b"little":
                raise ValueError("expected little-endian numbers")
            with archive.open(program) as file:
                content = _TensorUnpickler(file).load()
            tensors = {name: tensor for name, tensor in select(content).items() if isinstance(tensor, _Tensor)}
            storages = {tensor.storage for tensor in tensors.values()}
            values = {storage: _read_storage(archive, root, storage) for storage in storages}
            return {name: _view(values[tensor.storage], tensor) for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as error:  # a malicious pickle can fail in any way
        reason = first_line(error)
        raise ValueError(f"{path}: expected tensors as torch.save writes them, got something else ({reason})") from None


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        match module, name:
            case "torch", name if name in STORAGES:
                return STORAGES[name]
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch.nn.modules.container", "ParameterDict":
                return _ParameterDict
            case "__builtin__" | "builtins", "set":
                return set
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor")

    def persistent_load(self, reference):
        kind, dtype, key, _, numel = reference
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"it refers to a {kind!r}, which is not a storage of numbers")
        return _Storage(dtype, key, numel)


def _read_storage(archive, root, storage):
    entry = archive.getinfo(f"{root}data/{storage.key}")
    size = storage.numel * np.dtype(storage.dtype).itemsize
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise ValueError(f"storage {storage.key} does not have the size that its tensors need")
    return np.frombuffer(archive.read(entry), storage.dtype)


def _view(values, tensor):
    """The tensor as a strided view of its storage, after a check of the bounds."""
    _, offset, shape, strides = tensor
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= len(values):
        raise ValueError(f"a tensor reaches beyond its storage of {len(values)} numbers")
    steps = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
