"""FLUX.2: diffusers' transformer loads here and agrees, and ours loads in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_transformer, save_transformer
from diffusion_jax.interop.folders import transformer_of
from diffusion_jax.models.flux2 import Flux2Transformer
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_pipeline import filled

NAME = "Flux2Transformer2DModel"
SMALL = {
    "in_channels": 6,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "joint_attention_dim": 14,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 6, 8, 2),
    "guidance_embeds": False,
}
NETWORKS = {
    "small": SMALL,
    "as deep in both kinds, other outputs": SMALL | {"num_layers": 3, "num_single_layers": 3, "out_channels": 5},
    "one head, wide feed-forwards": SMALL | {"num_attention_heads": 1, "mlp_ratio": 4.5, "eps": 1e-3},
    "heads of 128, other angles": SMALL | {"attention_head_dim": 128, "axes_dims_rope": (32,) * 4, "rope_theta": 500},
    "with a guidance scale, as FLUX.2-dev": SMALL | {"guidance_embeds": True},
}
SIZES = [((4, 4), 7), ((3, 10), 1), ((5, 2), 512)]


def inputs_of(config, grid, words):
    rng = np.random.default_rng(words)
    x, text = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((3, *grid, config["in_channels"]), (3, words, config["joint_attention_dim"]))
    )
    cond = {"text": text}
    if config["guidance_embeds"]:
        cond["guidance"] = np.array([1.0, 2.5, 4.0], np.float32)
    return x, np.array([0.0, 371.5, 1000.0], np.float32), cond


def outputs(module, variables, inputs):
    return np.asarray(jax.jit(module.apply)(variables, *jax.tree.map(jnp.asarray, inputs)), np.float32)


def their_outputs(peer, theirs, inputs, dtype=None):  # noqa: F811
    """As Flux2KleinPipeline calls it."""
    import torch

    x, t, cond = inputs
    grid, words = x.shape[1:3], cond["text"].shape[1]
    of_image = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1]), torch.arange(1))
    of_text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(words))
    guidance = torch.from_numpy(cond["guidance"]) if "guidance" in cond else None
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(x.reshape(len(x), -1, x.shape[-1])).to(dtype),
            encoder_hidden_states=torch.from_numpy(cond["text"]).to(dtype),
            timestep=torch.from_numpy(t / 1000),
            img_ids=of_image,
            txt_ids=of_text,
            guidance=guidance,
        ).sample
    return out.float().numpy().reshape(*x.shape[:3], -1)


def difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_outputs_equal_those_of_diffusers(config, peer, tmp_path):  # noqa: F811
    theirs = peer.make(NAME, config)
    theirs.save_pretrained(tmp_path)
    ours, variables = load_transformer(tmp_path)
    stacked = load_transformer(tmp_path, scan=True)
    for grid, words in SIZES:
        inputs = inputs_of(config, grid, words)
        expected = their_outputs(peer, theirs, inputs)
        assert expected.std() > 0.05
        assert difference(outputs(ours, variables, inputs), expected) < 2e-5
    assert difference(outputs(*stacked, inputs), expected) < 2e-5


def test_half_precision_rounds_no_more_than_twice_as_much_as_diffusers(peer, tmp_path):  # noqa: F811
    import torch

    config = NETWORKS["as deep in both kinds, other outputs"]
    theirs = peer.make(NAME, config)
    theirs.save_pretrained(tmp_path)
    ours, variables = load_transformer(tmp_path, jnp.bfloat16)
    inputs = inputs_of(config, (6, 4), 9)
    exact = their_outputs(peer, theirs, inputs)
    rounded = their_outputs(peer, theirs.to(torch.bfloat16), inputs, torch.bfloat16)
    out = outputs(ours.clone(dtype=jnp.bfloat16), variables, inputs)
    assert 0 < difference(out, exact) < 2 * difference(rounded, exact)


@pytest.mark.parametrize("scan", [False, True])
def test_ours_load_in_diffusers(scan, peer, tmp_path):  # noqa: F811
    ours = Flux2Transformer(**SMALL, scan=scan)
    variables = filled(ours, *ours.example_inputs(), dtype=np.float32).params
    save_transformer(ours, variables, tmp_path)
    inputs = inputs_of(SMALL, (3, 4), 5)
    theirs = peer.load(NAME, tmp_path)
    assert difference(outputs(ours, variables, inputs), their_outputs(peer, theirs, inputs)) < 2e-5
    back = load_transformer(tmp_path, scan=scan)
    assert back[0] == ours
    jax.tree.map(np.testing.assert_array_equal, back[1], variables)


def test_what_is_masked_is_not_attended_to():
    network = Flux2Transformer(**SMALL)
    variables = filled(network, *network.example_inputs(), dtype=np.float32).params
    x, t, cond = inputs_of(SMALL, (2, 3), 6)
    mask = np.arange(6) < np.array([[6], [4], [1]])
    masked = [
        outputs(network, variables, (x, t, {"text": text, "mask": mask}))
        for text in (cond["text"], cond["text"] * mask[..., None])
    ]
    np.testing.assert_array_equal(*masked)
    assert difference(outputs(network, variables, (x, t, cond))[1:], masked[0][1:]) > 1e-3


def count(**changes):
    network = Flux2Transformer(**changes)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_klein_has_its_published_size():
    assert count(scan=True) == 3_875_544_576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "FluxTransformer2DModel"},
            "expected one of .*Flux2Transformer2DModel, .*, got FluxTransformer",
        ),
        ({"axes_dims_rope": (10, 10)}, "axes_dims_rope must be four widths that add up to attention_head_dim = 20"),
        ({"patch_size": 2}, "expected patch_size 1 and at least one block of each kind, got patch_size 2"),
        ({"pooled_projection_dim": 768}, "pooled_projection_dim=768 is not supported"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        transformer_of({"_class_name": NAME} | SMALL | changes, "config.json")
    assert "\n" not in str(error.value)


def test_weights_of_another_size_are_one_line(tmp_path):
    """As those of klein 9B beside the config.json of 4B."""
    larger = Flux2Transformer(**SMALL | {"num_attention_heads": 4, "num_layers": 2})
    save_transformer(larger, filled(larger, *larger.example_inputs()).params, tmp_path)
    small = Flux2Transformer(**SMALL)
    save_transformer(small, filled(small, *small.example_inputs()).params, tmp_path / "small")
    (tmp_path / "config.json").write_bytes((tmp_path / "small" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"do its config\.json and its weights belong together") as error:
        load_transformer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 2, 5), (1, 3, 14)), "expected 6 input channels and a text of width 14, got 5 and 14"),
        (((1, 2, 2, 6), (1, 3, 48)), "expected 6 input channels and a text of width 14, got 6 and 48"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shapes, message):
    network = Flux2Transformer(**SMALL)
    x, text = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(()), {"text": text})
