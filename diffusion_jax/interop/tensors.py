"""Tensors of checkpoint files: safetensors (whole, half precision or sharded), and torch pickles if allowed.

A safetensors file has the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and
byte range), then the bytes of all tensors without gaps. Files are memory-mapped: a tensor takes memory only when it is
used, and a model is read one tensor at a time.
"""

import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from diffusion_jax import paths
from diffusion_jax.interop.pickled import read_pickle, state_dict
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in the reference implementation


def read_tensors(folder: str | Path, stem: str, allow_pickle: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """All tensors of a model folder by name, and the file (or shard index) that they come from.

    stem: "diffusion_pytorch_model" in folders of diffusers, "model" in those of transformers. Full precision is
      preferred to the fp16 and bf16 variants.
    allow_pickle: read .bin files if there is no safetensors file, see `read_pickle`.
    Raises FileNotFoundError if weights or a shard are missing, and ValueError for malformed files.
    """
    path = find_tensors(folder, stem)
    return (_read_shards if path.suffix == ".json" else read_file)(path, allow_pickle), str(path)


def find_tensors(folder: str | Path, stem: str) -> Path:
    """The file with the weights of a model folder, or the index of its shards. Arguments and errors as in
    `read_tensors`.
    """
    folder = paths.fetched(folder)
    for suffix, head in (("safetensors", stem), ("bin", "pytorch_model" if stem == "model" else stem)):
        for variant in ("", ".fp16", ".bf16"):
            name = f"{head}{variant}.{suffix}"
            for file in (name, f"{name}.index.json", f"{head}.{suffix}.index{variant}.json"):
                if (folder / file).is_file():
                    return folder / file
    raise FileNotFoundError(f"{folder / stem}.safetensors: no such file; expected the weights of one model there")


def read_file(
    path: str | Path, allow_pickle: bool = False, select: Callable[[Any], Mapping[str, Any]] = state_dict
) -> dict[str, np.ndarray]:
    """The tensors of one file. .safetensors, and .pti of the same format (learned words), are memory-mapped and
    read-only; .bin, .ckpt, .pt, .pth use `read_pickle`.

    select: as in `read_pickle`.
    Raises FileNotFoundError, and ValueError for a malformed file or a pickle without allow_pickle.
    """
    path = paths.fetched(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix in (".safetensors", ".pti"):
        return _read_safetensors(path)
    if path.suffix not in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{path}: expected a .safetensors file")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which may contain code; look for a .safetensors file, or set allow_pickle to "
            "read only its tensors, without running its code"
        )
    return read_pickle(path, select)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file. Raises ValueError if it is malformed."""
    path = paths.fetched(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _read_header(path)[1]


def write_file(
    path: str | Path,
    tensors: Mapping[str, ArrayLike],
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, sorted by name, as .safetensors. Writes one at a time, and the file appears when it is
    whole.

    dtype: of the stored floating-point tensors. None keeps the dtype of each.
    metadata: free texts for the header.
    """
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    stored = {name: _stored_dtype(tensors[name], dtype) for name in sorted(tensors)}
    for name, kind in stored.items():
        begin, end = end, end + math.prod(np.shape(tensors[name])) * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": list(np.shape(tensors[name])), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with paths.written(path) as unfinished, open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind in stored.items():
            file.write(np.asarray(tensors[name]).astype(kind, copy=False).tobytes())


def release(tensor: np.ndarray) -> None:
    """Free the memory of a part of a mapped file. It is read again if it is used again.

    Does nothing for other tensors, and on systems that do not support it.
    """
    base = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first, last = -(-start // mmap.PAGESIZE), (start + tensor.nbytes) // mmap.PAGESIZE  # not pages of neighbours
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def check_finite(name: str, tensor: np.ndarray, source: str | Path) -> None:
    """Raise ValueError naming the file and the tensor if one of its numbers is NaN or infinite.

    The bits of a magnitude, as an integer, are at least those of infinity just then. This reads a tensor once, several
    times as fast as `np.isfinite` in half precision.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    infinity = np.array(np.inf, tensor.dtype).view(bits)
    magnitudes = tensor.view(bits) & bits.type(np.iinfo(bits).max >> 1)  # without the sign
    if magnitudes.max(initial=0) >= infinity:
        count = np.count_nonzero(magnitudes >= infinity)
        raise ValueError(
            f"{source}: {name} has {count} of {tensor.size} values that are NaN or infinite; the file is damaged, or "
            "its training diverged"
        )


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError without a file, and ValueError for other content."""
    path = paths.at(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got something else ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Mapping) -> None:
    """Write a JSON object for `read_json`. Creates parent folders."""
    path = paths.at(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths.write(path, json.dumps(content, indent=2) + "\n")


def _stored_dtype(tensor, dtype):
    tensor_dtype = np.dtype(tensor.dtype)
    return np.dtype(dtype) if dtype is not None and jnp.issubdtype(tensor_dtype, jnp.floating) else tensor_dtype


def _read_header(path):
    """(name -> entry, metadata, position of the first tensor)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(
                f"{path}: expected a safetensors header of {length} bytes, the file has {size}; "
                "it is truncated or of another format, download it again"
            )
        try:
            header = json.loads(file.read(length))
            return header, dict(header.pop("__metadata__", {})), 8 + length
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: malformed safetensors header: {first_line(error)}") from None


def _read_safetensors(path):
    header, _, start = _read_header(path)
    try:
        spans = {name: _span(name, **entry) for name, entry in header.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: malformed safetensors header: {first_line(error)}") from None
    end = 0
    for begin, after, *_ in sorted(spans.values(), key=lambda span: span[:2]):
        if begin != end:
            raise ValueError(f"{path}: malformed safetensors header: bytes {min(begin, end)} to {max(begin, end)} "
                             "belong to no tensor or to two")  # fmt: skip
        end = after
    size = path.stat().st_size
    if start + end != size:
        raise ValueError(
            f"{path}: expected {start + end} bytes by its header, got {size}; "
            "it is truncated or not fully written, download it again"
        )
    data = np.asarray(np.memmap(path, np.uint8, "r"))[start:]
    try:
        return {name: data[begin:end].view(dtype).reshape(shape) for name, (begin, end, dtype, shape) in spans.items()}
    except (ValueError, OverflowError) as error:  # an empty tensor with too many or too long axes
        raise ValueError(f"{path}: malformed safetensors header: {first_line(error)}") from None


def _span(name, dtype, shape, data_offsets):
    """(first byte, byte after the last, dtype, shape) of a header entry. Raises ValueError for a contradiction."""
    begin, end = data_offsets
    if not name.isprintable():
        raise ValueError(f"{name!r} is not the name of a tensor")
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} at bytes {data_offsets}; expected natural numbers")
    kind = np.dtype(DTYPES[dtype])
    if math.prod(shape) * kind.itemsize != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes, which does not fit shape {shape} of {dtype}")
    return begin, end, kind, tuple(shape)


def shards(index: Path) -> dict[str, Path]:
    """The file of each tensor by an index of shards. Raises FileNotFoundError for a shard that is missing, and
    ValueError for a malformed index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map from each tensor's name to its file")
    for shard in sorted(set(weight_map.values())):
        if shard != PurePath(shard).name or "\\" in shard:
            raise ValueError(f"{index}: expected the names of files beside it, got {shard!r}")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such file, but {index.name} names it; download it too")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _read_shards(index, allow_pickle):
    places, tensors = shards(index), {}
    for shard in sorted(set(places.values())):
        tensors |= read_file(shard, allow_pickle)
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{index} names {len(missing)} tensors that its shards lack, such as {missing[0]}")
    return tensors
