"""Z-Image: diffusers' transformer loads here and agrees, and ours loads in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_transformer, save_transformer
from diffusion_jax.interop.folders import transformer_of
from diffusion_jax.models.z_image import ZImageTransformer
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_pipeline import filled

NAME = "ZImageTransformer2DModel"
SMALL = {
    "in_channels": 3,
    "dim": 42,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 10,
    "axes_dims": (6, 4, 4),
    "axes_lens": (600, 20, 30),
}
NETWORKS = {
    "small": SMALL,
    "deeper refiners, one head": SMALL | {"n_refiner_layers": 3, "n_heads": 1, "dim": 14, "norm_eps": 1e-3},
    "wider than the time, patches of 4": SMALL | {"dim": 280, "n_heads": 20, "all_patch_size": (4,), "n_layers": 1},
    "no norms of q and k, other angles": SMALL | {"qk_norm": False, "rope_theta": 50.0, "t_scale": 300.0},
}
SIZES = [((8, 8), (7, 7, 7)), ((4, 20), (1, 32, 33)), ((16, 8), (512, 40, 480))]


def inputs_of(config, sides, words):
    """Noisy latents, times and texts, of `words` tokens each."""
    rng = np.random.default_rng(sum(words))
    x = rng.normal(size=(3, *sides, config["in_channels"])).astype(np.float32)
    text = rng.normal(size=(3, max(words), config["cap_feat_dim"])).astype(np.float32)
    mask = np.arange(max(words)) < np.array(words)[:, None]
    t = np.array([1000.0, 984.375, 0.0], np.float32)  # 1 - t / 1000 has no rounding
    return x, t, {"text": text, "mask": mask}


def outputs(module, variables, inputs):
    return np.asarray(jax.jit(module.apply)(variables, *jax.tree.map(jnp.asarray, inputs)), np.float32)


def their_outputs(config, theirs, inputs, dtype=None):
    """As ZImagePipeline calls it."""
    import torch

    x, t, cond = inputs
    with torch.no_grad():
        out = theirs(
            [torch.from_numpy(image.transpose(2, 0, 1)[:, None].copy()).to(dtype) for image in x],
            torch.from_numpy(1 - t / 1000),
            [torch.from_numpy(text[mask]).to(dtype) for text, mask in zip(cond["text"], cond["mask"], strict=True)],
            patch_size=config.get("all_patch_size", (2,))[0],
        ).sample
    return -np.stack([image[:, 0].float().numpy().transpose(1, 2, 0) for image in out])


def difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def assert_equal(ours, theirs):
    """Outputs for `inputs_of`. A clean image has the time 1000 for the network: there the last digit of one float32
    frequency turns a wave by 6e-5 radians, in both programs.
    """
    assert ours.shape == theirs.shape and theirs.std() > 0.05
    assert difference(ours[:2], theirs[:2]) < 2e-5 and difference(ours[2], theirs[2]) < 1e-4


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_outputs_equal_those_of_diffusers(config, peer, tmp_path):  # noqa: F811
    theirs = peer.make(NAME, config)
    theirs.save_pretrained(tmp_path)
    ours, variables = load_transformer(tmp_path)
    for sides, words in SIZES:
        inputs = x, t, cond = inputs_of(config, sides, words)
        expected = their_outputs(config, theirs, inputs)
        assert_equal(outputs(ours, variables, inputs), expected)
        if cond["mask"].all():
            assert_equal(outputs(ours, variables, (x, t, {"text": cond["text"]})), expected)
    stacked = load_transformer(tmp_path, scan=True)
    assert_equal(outputs(*stacked, inputs), expected)


def test_half_precision_rounds_no_more_than_twice_as_much_as_diffusers(peer, tmp_path):  # noqa: F811
    import torch

    theirs = peer.make(NAME, SMALL)
    theirs.save_pretrained(tmp_path)
    ours, variables = load_transformer(tmp_path, jnp.bfloat16)
    inputs = inputs_of(SMALL, (8, 4), (9, 3, 7))
    exact = their_outputs(SMALL, theirs, inputs)
    rounded = their_outputs(SMALL, theirs.to(torch.bfloat16), inputs, torch.bfloat16)
    out = outputs(ours.clone(dtype=jnp.bfloat16), variables, inputs)
    assert 0 < difference(out, exact) < 2 * difference(rounded, exact)


@pytest.mark.parametrize("scan", [False, True])
def test_ours_load_in_diffusers(scan, peer, tmp_path):  # noqa: F811
    config = {name: value for name, value in SMALL.items() if name != "n_kv_heads"}
    ours = ZImageTransformer(**config, scan=scan)
    variables = filled(ours, *ours.example_inputs(), dtype=np.float32).params
    save_transformer(ours, variables, tmp_path)
    inputs = inputs_of(SMALL, (4, 8), (5, 6, 33))
    theirs = peer.load(NAME, tmp_path)
    assert_equal(outputs(ours, variables, inputs), their_outputs(config, theirs, inputs))
    back = load_transformer(tmp_path, scan=scan)
    assert back[0] == ours
    jax.tree.map(np.testing.assert_array_equal, back[1], variables)


def test_it_has_its_published_size():
    network = ZImageTransformer(scan=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_154_908_736


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152 is not supported"),
        ({"axes_dims": (6, 4)}, "expected three axes_dims that add up to dim / n_heads = 14 and three axes_lens"),
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, "expected one size of patches, of one frame"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        transformer_of({"_class_name": NAME} | SMALL | changes, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sides", "words", "message"),
    [
        (
            (8, 6),
            600,
            "axes_lens allow 598 tokens of text, a multiple of 32, and latents of 40 x 60, got 608",
        ),
        ((42, 6), 5, "latents of 40 x 60, got 32 and 42 x 6"),
        ((7, 6), 5, "multiples of 2, the size of a patch, got 7 and 6"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(sides, words, message):
    network = ZImageTransformer(**{name: value for name, value in SMALL.items() if name != "n_kv_heads"})
    cond = {"text": jnp.zeros((1, words, 10))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *sides, 3)), jnp.zeros(()), cond)
