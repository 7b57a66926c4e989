"""Tensor files: what the reference implementation writes is read; a malformed file does no more than raise one line."""

import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from diffusion_jax.interop.tensors import read_file, read_tensors, release, write_file

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.half": np.arange(4).astype(jnp.bfloat16),
    "c": np.array(3, np.float16),
    "d": np.zeros((0, 5), np.int64),
    "e": np.array([True, False]),
}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            other[name].dtype,
            other[name].shape,
            other[name].tobytes(),
        )


def test_the_reference_reads_ours_and_we_read_the_reference(tmp_path):
    write_file(tmp_path / "ours.safetensors", TENSORS)
    assert_same(load_file(tmp_path / "ours.safetensors"), TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert_same(read_file(tmp_path / "theirs.safetensors"), TENSORS)


def test_a_released_tensor_and_its_neighbours_keep_their_values(tmp_path):
    tensors = {name: np.random.default_rng(0).normal(size=(300, 301)).astype(np.float32) for name in "abc"}
    write_file(tmp_path / "x.safetensors", tensors)
    read = read_file(tmp_path / "x.safetensors")
    release(read["b"])
    release(read["b"].T[:2])
    release(tensors["a"])
    for name in tensors:
        np.testing.assert_array_equal(read[name], tensors[name])


def test_writing_converts_floats_and_leaves_no_temporary_file(tmp_path):
    write_file(tmp_path / "x.safetensors", TENSORS, np.float16)
    kinds = {name: str(tensor.dtype) for name, tensor in read_file(tmp_path / "x.safetensors").items()}
    assert kinds == {"a": "float16", "b.half": "float16", "c": "float16", "d": "int64", "e": "bool"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("variant", ["model", "model.fp16", "model.bf16"])
def test_variants(variant, tmp_path):
    write_file(tmp_path / f"{variant}.safetensors", TENSORS)
    tensors, source = read_tensors(tmp_path, "model")
    assert_same(tensors, TENSORS)
    assert source == str(tmp_path / f"{variant}.safetensors")


def sharded(folder, name="model.safetensors.index.json", **places):
    write_file(folder / "1.safetensors", {"a": TENSORS["a"]})
    write_file(folder / "2.safetensors", {"e": TENSORS["e"]})
    (folder / name).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "e": "2.safetensors", **places}}))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards(name, tmp_path):
    sharded(tmp_path, name)
    tensors, source = read_tensors(tmp_path, "model")
    assert_same(tensors, {"a": TENSORS["a"], "e": TENSORS["e"]})
    assert source == str(tmp_path / name)


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ({"z": "3.safetensors"}, FileNotFoundError, "3.safetensors: no such file, but model.safetensors.index.json"),
        ({"z": "1.safetensors"}, ValueError, "names 1 tensors that its shards lack, such as z"),
        ({"z": "../1.safetensors"}, ValueError, "expected the names of files beside it, got '../1.safetensors'"),
        ({"z": "/etc/passwd"}, ValueError, "expected the names of files beside it"),
        ({"z": ".."}, FileNotFoundError, "no such file"),
        ({"z": 3}, ValueError, "expected a weight_map from each tensor's name to its file"),
    ],
)
def test_a_wrong_index_is_one_line(places, error, message, tmp_path):
    sharded(tmp_path, **places)
    with pytest.raises(error, match=message) as raised:
        read_tensors(tmp_path, "model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("content", "message"), [("{", "expected JSON"), ("[1]", "expected a JSON object, got list")])
def test_an_index_that_is_no_json_is_one_line(content, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path, "model")


def entry(dtype="F32", shape=(2,), ends=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(ends)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "malformed"),
        ({"x": 1}, "malformed"),
        ({"x": {"dtype": "F32"}}, "malformed"),
        ({"x": entry("F4")}, "x has dtype 'F4'; expected one of F64, F32"),
        ({"x": entry(shape=(3,))}, "x has 8 bytes, which does not fit shape .3. of F32"),
        ({"x": entry(shape=(-1, -2))}, "expected natural numbers"),
        ({"x": entry(ends=(8, 0))}, "does not fit"),
        ({"x": entry(ends=(4, 12))}, "bytes 0 to 4 belong to no tensor or to two"),
        ({"x": entry(), "y": entry()}, "bytes 0 to 8 belong to no tensor or to two"),
        ({"x": entry(shape=(4,), ends=(0, 16))}, "it is truncated or not fully written"),
        ({"x\n": entry()}, "is not the name of a tensor"),
        ({"x": entry(shape=(2**80, 0), ends=(0, 0)), "y": entry()}, "malformed"),
        ({"x": entry(shape=(0,) * 99, ends=(0, 0)), "y": entry()}, "malformed"),
    ],
)
def test_a_wrong_header_is_one_line(header, message, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=message) as raised:
        read_file(tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_file_is_read_whole_or_not_at_all(tmp_path_factory, data):
    whole = save({"a": TENSORS["a"], "e": TENSORS["e"]})
    kind = data.draw(st.sampled_from(["cut", "byte", "header"]))
    if kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "byte":
        content = bytearray(whole)
        content[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    else:
        header = data.draw(st.binary(max_size=64))
        content = len(header).to_bytes(8, "little") + header + bytes(data.draw(st.integers(0, 16)))
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_file(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert kind != "cut"
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("content", [Evil(), {"state_dict": {"x": Evil()}}])
def test_pickles_are_refused_and_never_run(content, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    with pytest.raises(ValueError, match="which may contain code; look for a"):
        read_file(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"it asks for builtins\.print, which is not a tensor") as raised:
        read_file(tmp_path / "x.ckpt", allow_pickle=True)
    assert "\n" not in str(raised.value)
    assert not capsys.readouterr().out


def test_pickles_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    matrix = torch.arange(12.0).reshape(3, 4)
    content = {
        "matrix": matrix,
        "transposed": matrix.T,
        "row": matrix[1:2, ::2],
        "half": matrix.half(),
        "bfloat16": matrix.bfloat16(),
        "parameter": torch.nn.Parameter(matrix),
        "number": torch.tensor(3),
    }
    torch.save({"state_dict": content, "step": 4}, tmp_path / "x.ckpt")
    tensors = read_file(tmp_path / "x.ckpt", allow_pickle=True)
    assert tensors.keys() == content.keys()
    for name, tensor in content.items():
        np.testing.assert_array_equal(tensors[name].astype(np.float32), tensor.detach().float().numpy())
        assert str(tensors[name].dtype) == str(tensor.dtype).removeprefix("torch.")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_pickle_is_read_or_raises_one_line(tmp_path_factory, data):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    torch.save({"a": torch.arange(3.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    (program,) = [name for name in parts if name.endswith("data.pkl")]
    parts[program][data.draw(st.integers(0, len(parts[program]) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(content))
    try:
        tensors = read_file(path, allow_pickle=True)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(tensor.nbytes <= 12 for tensor in tensors.values())
