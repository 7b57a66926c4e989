"""The check of a published model reports wrong tensors, and finds a block with different outputs."""

import numpy as np
import pytest

from diffusion_jax.interop import save_pipeline, verify
from diffusion_jax.interop.tensors import read_file, write_file
from tests.interop.test_pipeline import our_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(our_pipeline(), folder)
    return folder


def test_every_wrong_tensor_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "PEER_PACKAGES", ("a package that is not there",))
    assert verify.main([str(folder)]) == 0
    assert capsys.readouterr().out.count(", all as ") == 3
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = {name: np.array(tensor) for name, tensor in read_file(weights).items()}
    changed = {name: tensor for name, tensor in whole.items() if name != "conv_in.bias"}
    write_file(weights, changed | {"new.weight": np.zeros(1), "conv_out.bias": np.zeros(5)})
    assert verify.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    write_file(weights, whole)
    assert lines[:3] == [
        "unet: missing conv_in.bias",
        "unet: unexpected new.weight",
        "unet: misshapen conv_out.bias (5,) instead of (4,)",
    ]


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'model_index.json'}: no such file\n"
    assert verify.main([]) == 2


def test_every_block_agrees_with_the_peer(folder, capsys, monkeypatch):
    for package in verify.PEER_PACKAGES:
        pytest.importorskip(package)
    assert verify.main([str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in printed if ", all as " not in line and "not compared: the shape is" not in line]
    found = {f"{part} {block}": float(difference) for part, block, difference in lines}
    assert {"unet: down_blocks.1", "unet: mid_block", "vae: decoder.up_blocks.0", "vae: quant_conv"} <= found.keys()
    assert "text_encoder: text_model.encoder.layers.1" in found
    assert max(found.values()) < 2e-5
