"""The rule between Flax and torch names works both ways and reports errors in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop.names import from_torch, to_torch, torch_name

PARAMS = {
    "params": {
        "down_blocks_0": {"attentions_11": {"to_out_0": {"kernel": jnp.arange(6.0).reshape(2, 3)}}},
        "conv_in": {"kernel": jnp.arange(36.0).reshape(3, 3, 2, 2), "bias": jnp.zeros(2)},
        "norm1": {"scale": jnp.ones(3)},
    }
}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks_0/resnets_1/conv1/kernel", "down_blocks.0.resnets.1.conv1.weight"),
        ("mid_block/attentions_0/to_out_0/bias", "mid_block.attentions.0.to_out.0.bias"),
        ("transformer_blocks_10/ff/net_0/proj/kernel", "transformer_blocks.10.ff.net.0.proj.weight"),
        ("time_embedding/linear_2/kernel", "time_embedding.linear_2.weight"),
        ("conv_norm_out/scale", "conv_norm_out.weight"),
        ("class_embedding/embedding", "class_embedding.weight"),
    ],
)
def test_names(path, name):
    assert torch_name(tuple(path.split("/"))) == name


def test_layout_of_kernels():
    tensors = to_torch(PARAMS)
    assert tensors["down_blocks.0.attentions.11.to_out.0.weight"].shape == (3, 2)  # y = W·x
    kernel = PARAMS["params"]["conv_in"]["kernel"]
    assert tensors["conv_in.weight"][1, 0, 2, 1] == kernel[2, 1, 0, 1]  # (out, in, height, width)


def test_round_trip():
    back = from_torch(to_torch(PARAMS), "memory", PARAMS)
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_oldest_attention_names():
    tensors = to_torch(PARAMS)
    tensors["down_blocks.0.attentions.11.proj_attn.weight"] = tensors.pop("down_blocks.0.attentions.11.to_out.0.weight")
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors, "memory", PARAMS), PARAMS)


def test_half_precision_becomes_the_type_asked_for():
    halves = {name: tensor.astype(jnp.bfloat16) for name, tensor in to_torch(PARAMS).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(from_torch(halves, "memory", PARAMS))} == {jnp.dtype(jnp.float32)}


def test_every_mismatch_is_one_line():
    tensors = to_torch(PARAMS)
    cases = [
        (
            {name: t for name, t in tensors.items() if "conv" not in name},
            "lacks 2 tensors: conv_in.bias, conv_in.weight;",
        ),
        (tensors | {f"extra.{i}": np.zeros(1) for i in range(5)}, "unknown 5 tensors: extra.0, extra.1, extra.2, …;"),
        (tensors | {"norm1.weight": np.zeros(4)}, r"misshapen 1 tensor: norm1.weight \(4,\) instead of \(3,\);"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            from_torch(wrong, "some/file", PARAMS)
        assert str(error.value).startswith("some/file ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, np.float16, np.float32, np.float64, jnp.float8_e4m3fn, jnp.float8_e5m2]
)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_one_line(value, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in to_torch(PARAMS).items()}
    from_torch(tensors | {"norm1.weight": np.array([0, -1, jnp.finfo(dtype).max]).astype(dtype)}, "some/file", PARAMS)
    wrong = tensors | {"norm1.weight": np.array([0, value, 1]).astype(dtype)}
    with pytest.raises(
        ValueError, match=r"^some/file: norm1.weight has 1 of 3 values that are NaN or infinite; [^\n]*$"
    ):
        from_torch(wrong, "some/file", PARAMS)
