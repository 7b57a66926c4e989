"""Laws of the U-Net; its equality with diffusers is in tests/interop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers import dropout
from diffusion_jax.models.unet import UNet

TEXT = UNet(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=12,
)
PIXELS = UNet(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
    num_class_embeds=11,
    dropout=0.5,
)


# one level each, which compile in a third of the time
TEXT_1 = TEXT.clone(
    block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)
PIXELS_1 = PIXELS.clone(
    block_out_channels=(16,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)
)


def randomised(unet, seed=0):
    """Variables without the zeros that training starts from."""
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes)


text_apply, pixels_apply = jax.jit(TEXT_1.apply), jax.jit(PIXELS_1.apply)


def inputs(unet, size=(8, 8), batch=2):
    x = jax.random.normal(jax.random.key(1), (batch, *size, unet.in_channels))
    t = jnp.array([3, 700])[:batch]
    if unet.num_class_embeds:
        return x, t, {"label": jnp.array([1, 10])[:batch]}
    text, mask = jax.random.normal(jax.random.key(2), (batch, 5, 12)), jnp.arange(5) < jnp.array([[3], [5]])[:batch]
    return x, t, {"text": text, "mask": mask}


@pytest.mark.parametrize("unet", [TEXT, PIXELS])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_output_is_an_image_of_the_same_size(unet, size):
    out = jax.eval_shape(unet.clone(dtype=jnp.bfloat16).apply, randomised(unet), *inputs(unet, size))
    assert (out.shape, out.dtype) == ((2, *size, unet.out_channels), jnp.float32)


def test_bfloat16_keeps_parameters_and_is_near():
    variables = randomised(TEXT_1)
    half = TEXT_1.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), *half.example_inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    exact, rounded = (jax.jit(unet.apply)(variables, *inputs(unet)) for unet in (TEXT_1, half))
    assert 0 < jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()


def test_fresh_network_predicts_zero_and_has_a_gradient():
    variables = jax.jit(PIXELS_1.init)(jax.random.key(0), *PIXELS_1.example_inputs())
    x = inputs(PIXELS_1)
    np.testing.assert_array_equal(pixels_apply(variables, *x), 0.0)
    gradient = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(PIXELS_1.apply(v, *x) - 1))))(variables)
    assert jnp.abs(gradient["params"]["conv_out"]["kernel"]).max() > 0


def test_images_do_not_depend_on_their_batch():
    variables, both, first = randomised(TEXT_1), inputs(TEXT_1), inputs(TEXT_1, batch=1)
    np.testing.assert_allclose(text_apply(variables, *both)[:1], text_apply(variables, *first), atol=1e-5)


def test_one_time_for_all_images():
    variables, (x, _, cond) = randomised(TEXT_1), inputs(TEXT_1)
    one, each = (text_apply(variables, x, t, cond) for t in (jnp.array(5.0), jnp.array([5.0, 5.0])))
    np.testing.assert_array_equal(one, each)


def test_padding_of_the_text_is_not_seen():
    variables, (x, t, cond) = randomised(TEXT_1), inputs(TEXT_1)
    padded = cond | {"text": jnp.where(cond["mask"][..., None], cond["text"], 100.0)}
    np.testing.assert_array_equal(text_apply(variables, x, t, cond), text_apply(variables, x, t, padded))


def test_dropout_of_an_image_depends_on_its_key_alone():
    """Not on its batch: so a gradient does not depend on how a batch is divided."""
    variables, x = randomised(PIXELS_1), inputs(PIXELS_1)
    both = jax.tree.map(lambda part: jnp.concatenate([part, part]), x)
    drop = jax.jit(lambda keys, *x: PIXELS_1.apply(variables, *x, keys=keys))
    keys = jax.random.split(jax.random.key(0), 2 * len(x[0]))
    together = drop(keys, *both)
    halves = drop(keys[: len(x[0])], *x), drop(keys[len(x[0]) :], *x)
    np.testing.assert_allclose(together, jnp.concatenate(halves), atol=1e-5)
    assert jnp.all(jnp.any(halves[0] != halves[1], axis=(1, 2, 3)))
    np.testing.assert_array_equal(pixels_apply(variables, *x), pixels_apply(variables, *x))


def test_dropout_has_its_rate_and_another_mask_in_every_layer():
    keys, x = jax.random.split(jax.random.key(0), 3), jnp.ones((3, 32, 32, 8))
    first, second = (dropout(x, 0.3, keys, place) for place in (0, 1))
    np.testing.assert_allclose(np.unique(first), [0, 1 / 0.7], rtol=1e-6)
    assert abs(jnp.mean(first == 0) - 0.3) < 4 * np.sqrt(0.21 / x.size)
    assert abs(jnp.mean((first == 0) & (second == 0)) - 0.09) < 4 * np.sqrt(0.09 * 0.91 / x.size)


def test_ddpm_and_stable_diffusion_have_their_published_sizes():
    ddpm = UNet(
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    for unet, size in ((ddpm, 35_746_307), (UNet(cross_attention_dim=768), 859_520_964)):
        shapes = jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types has 1 entries, block_out_channels has 2"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block has 3 entries"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "one of UNetMidBlock2D, UNetMidBlock2DCrossAttn"),
        ({"up_block_types": ("UpBlock2D", "DownBlock2D")}, "up_block_types has 'DownBlock2D'"),
        ({"resnet_time_scale_shift": "ada_group"}, r"must be one of \('default', 'scale_shift'\), got 'ada_group'"),
        ({"norm_num_groups": 3}, "16 channels cannot be split into 3 groups"),
        (
            {"attention_head_dim": 5},
            "32 channels cannot be split into 5 heads|16 channels cannot be split into 5 heads",
        ),
        ({"cross_attention_dim": 13}, r"width 13, got shape \(2, 5, 12\)"),
        ({"num_class_embeds": 3}, "expected a condition with text, label, got mask, text"),
        ({"in_channels": 9}, "expected a condition with text, known, got mask, text"),
        ({"in_channels": 2}, "expected 2 input channels .* got 4"),
        ({"addition_embed_type": "text"}, r"must be one of \(None, 'text_time'\)"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        ({"class_embed_type": "timestep"}, r"must be one of \(None, 'projection'\)"),
        ({"class_embed_type": "projection"}, "expected a condition with text, text_embeds, got mask, text"),
        ({"class_embed_type": "projection", "num_class_embeds": 3}, "exclude each other"),
    ],
)
def test_contradictions_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(TEXT.clone(**fields).init, jax.random.key(0), *inputs(TEXT))
    assert "\n" not in str(error.value)


def test_what_a_network_is_not_told_of_is_refused():
    for unet, name in ((TEXT_1, "label"), (PIXELS_1, "text"), (TEXT_1, "known"), (PIXELS_1, "mask")):
        x, t, cond = inputs(unet)
        with pytest.raises(ValueError, match=f"got .*{name}"):
            jax.eval_shape(unet.init, jax.random.key(0), x, t, cond | {name: jnp.zeros((2, 5, 12))})


class Control(nn.Module):
    """The way down of a network beside it, with variables of its own: what a control network is made of."""

    unet: UNet

    def setup(self):
        nn.share_scope(self, self.unet)

    def __call__(self, x, t, cond):
        h, skips, _ = self.unet.encode(x, t, cond)
        return h, skips


@pytest.mark.slow
def test_the_way_down_serves_another_network_and_the_way_up_takes_its_answer():
    variables, (x, t, cond) = randomised(TEXT), inputs(TEXT)
    control = Control(TEXT)
    control_params = jax.eval_shape(control.init, jax.random.key(0), x, t, cond)["params"]
    assert set(control_params) == {"conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"}
    part = {"params": {name: variables["params"][name] for name in control_params}}
    assert jax.tree.map(jnp.shape, part["params"]) == jax.tree.map(jnp.shape, control_params)

    def controlled(scale):
        middle, skips = control.apply(part, x, t, cond)
        h, own_skips, resnet_inputs = TEXT.apply(variables, x, t, cond, method="encode")
        h, own_skips = h + scale * middle, [a + scale * b for a, b in zip(own_skips, skips, strict=True)]
        return TEXT.apply(variables, h, own_skips, resnet_inputs, cond, method="decode")

    controlled = jax.jit(controlled)
    np.testing.assert_allclose(controlled(0.0), TEXT.apply(variables, x, t, cond), atol=1e-5)
    assert jnp.abs(controlled(1.0) - controlled(0.0)).max() > 0.01
