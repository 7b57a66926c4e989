"""Laws of the transformer; its equality with diffusers is in tests/interop."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import transformer as transformers
from diffusion_jax.models.attention import attention
from diffusion_jax.models.stacking import mapped
from diffusion_jax.models.transformer import Transformer

SMALL = Transformer(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=3)
CLASSES = SMALL.clone(num_embeds_ada_norm=5, modulation="own", dropout=0.5)
CROSS = SMALL.clone(text="cross", cross_attention_dim=6, positions="learned", target_embedding=True)
JOINT = SMALL.clone(
    text="joint",
    cross_attention_dim=6,
    modulation="shared",
    norm="rms_norm",
    norm_elementwise_affine=True,
    qk_norm="rms_norm",
    activation_fn="swiglu",
    mlp_ratio=8 / 3,
    positions=None,
    axes_dims_rope=(2, 4, 2),
    time_cond_proj_dim=4,
    interval_embedding=True,
)
KINDS = {"classes": CLASSES, "cross": CROSS, "joint": JOINT}
every_kind = pytest.mark.parametrize("network", KINDS.values(), ids=KINDS)


def randomised(network, seed=0):
    """Variables without the zeros that training starts from."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)), shapes)


def fresh(network):
    return jax.jit(network.init)(jax.random.key(0), *network.example_inputs())


def inputs(network, size=(8, 8), batch=2):
    rng = np.random.default_rng(1)
    cond = {
        "text": jnp.float32(rng.normal(size=(2, 5, 6))),
        "mask": jnp.arange(5) < jnp.array([[3], [5]]),
        "label": jnp.array([1, 5]),
        "to": jnp.array([0.0, 400.0]),
        "guidance": jnp.array([1.0, 4.0]),
        "interval": jnp.array([[0.0, 1000.0], [200.0, 700.0]]),
    }
    read = {name for name, is_read in network.reads.items() if is_read}
    read |= {"mask"} if "text" in read else set()
    x = jnp.float32(rng.normal(size=(2, *size, 3)))
    return x[:batch], jnp.array([3.0, 700.0])[:batch], {name: cond[name][:batch] for name in sorted(read)}


def stacked(variables, like):
    """Variables of single blocks as those of a scanned network."""
    flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: mapped(lambda path, _: np.asarray(flat[path]), tuple(key.key for key in path), leaf), like
    )


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())


@every_kind
@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_output_is_an_image_of_the_same_size(network, size):
    out = jax.eval_shape(network.clone(dtype=jnp.bfloat16).apply, randomised(network), *inputs(network, size))
    assert (out.shape, out.dtype) == ((2, *size, 3), jnp.float32)


@every_kind
def test_blocks_of_a_fresh_network_pass_tokens_on_and_it_predicts_zero(network):
    outermost = {"capture_intermediates": lambda module, _: len(module.path) == 1, "mutable": ["intermediates"]}
    apply = jax.jit(functools.partial(network.apply, **outermost))
    out, state = apply(fresh(network), *inputs(network))
    state = state["intermediates"]
    blocks = [state[f"transformer_blocks_{i}"]["__call__"][0][0] for i in range(2)]
    np.testing.assert_array_equal(blocks[0], blocks[1])
    np.testing.assert_array_equal(blocks[0][:, -16:], state["pos_embed"]["__call__"][0])
    np.testing.assert_array_equal(out, 0.0)


def test_a_fresh_network_has_a_gradient():
    variables, x = fresh(CLASSES), inputs(CLASSES)
    gradient = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(CLASSES.apply(v, *x) - 1))))(variables)
    assert jnp.abs(gradient["params"]["proj_out_2"]["kernel"]).max() > 0


def test_without_positions_patches_are_a_set():
    """A permutation of the patches permutes the output. With positions it does not."""
    network = SMALL.clone(positions=None, patch_size=1)
    order = np.random.default_rng(0).permutation(16)
    x, t, cond = inputs(network, (4, 4))
    shuffled = x.reshape(2, 16, 3)[:, order].reshape(x.shape)
    for placed in ({}, {"positions": "sincos"}, {"axes_dims_rope": (4, 4)}, {"axes_dims_rope": (8,)}):
        variables, apply = randomised(network.clone(**placed)), jax.jit(network.clone(**placed).apply)
        out, of_shuffled = apply(variables, x, t, cond), apply(variables, shuffled, t, cond)
        difference = jnp.abs(out.reshape(2, 16, 3)[:, order] - of_shuffled.reshape(2, 16, 3)).max()
        assert (difference < 1e-5) == (not placed), placed


@pytest.mark.parametrize("network", [CLASSES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (CROSS, JOINT))])
def test_scanned_blocks_give_the_same_values_and_gradients(network):
    """Also with dropout, which depends on the number of the block."""
    variables, keys = randomised(network), jax.random.split(jax.random.key(5), 2)
    scanned = network.clone(scan=True, remat=True)

    def value_and_gradient(network, variables):
        return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(network.apply(v, *inputs(network), keys)))))(
            variables
        )

    value, gradient = value_and_gradient(network, variables)
    of_scanned, gradient_of_scanned = value_and_gradient(scanned, stacked(variables, shapes_of(scanned)))
    np.testing.assert_allclose(of_scanned, value, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    expected = stacked(gradient, shapes_of(scanned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradient_of_scanned, expected)


def test_a_scanned_network_is_no_longer_a_program_for_more_blocks():
    def lines(depth, scan):
        network = JOINT.clone(num_layers=depth, scan=scan)
        return len(jax.jit(network.apply).lower(shapes_of(network), *inputs(network)).as_text().splitlines())

    assert lines(28, scan=True) == lines(2, scan=True)
    assert lines(3, scan=False) > 1.2 * lines(2, scan=False)


def test_layers_of_a_scanned_network_start_differently():
    variables = fresh(CROSS.clone(scan=True))
    kernel = variables["params"]["transformer_blocks_each"]["attn1"]["to_q"]["kernel"]
    assert kernel.shape == (2, 16, 16) and jnp.abs(kernel[0] - kernel[1]).max() > 0.1
    assert jnp.abs(kernel).max() <= (6 / 32) ** 0.5  # the bound of one map's uniform distribution


def test_bfloat16_keeps_parameters_and_is_near():
    variables, half = randomised(JOINT), JOINT.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype(jnp.float32)}
    exact, rounded = (jax.jit(network.apply)(variables, *inputs(network)) for network in (JOINT, half))
    assert 0 < jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()


@every_kind
def test_images_do_not_depend_on_their_batch(network):
    variables, apply = randomised(network), jax.jit(network.apply)
    keys = jax.random.split(jax.random.key(5), 2)
    both, first = (apply(variables, *inputs(network, batch=n), keys[:n]) for n in (2, 1))
    np.testing.assert_allclose(both[:1], first, atol=1e-5)


def test_dropout_is_turned_on_by_keys_and_differs_between_blocks():
    variables, x = randomised(CLASSES), inputs(CLASSES)
    apply, keys = jax.jit(CLASSES.apply), jax.random.split(jax.random.key(5), 2)
    assert jnp.abs(apply(variables, *x) - apply(variables, *x, keys)).max() > 1e-3
    dropped = []

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "_drop":
            dropped.append(np.asarray(next_fun(args[0], args[1], jnp.ones_like(args[2]), args[3])))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        CLASSES.apply(variables, *x, keys)
    assert len(dropped) == 4
    for i in range(4):
        for j in range(i):
            assert np.any(dropped[i] != dropped[j])


@pytest.mark.parametrize("network", [CROSS, JOINT])
def test_padding_of_the_text_is_not_seen(network):
    variables, (x, t, cond) = randomised(network), inputs(network)
    apply = jax.jit(network.apply)
    padded = cond | {"text": jnp.where(cond["mask"][..., None], cond["text"], 100.0)}
    out = apply(variables, x, t, cond)
    np.testing.assert_array_equal(out, apply(variables, x, t, padded))
    assert jnp.abs(out - apply(variables, x, t, cond | {"text": 2 * cond["text"]})).max() > 1e-3


@every_kind
def test_everything_that_is_read_matters(network):
    variables, (x, t, cond) = randomised(network), inputs(network)
    apply = jax.jit(network.apply)
    out = apply(variables, x, t, cond)
    assert jnp.abs(out - apply(variables, x, t + 50, cond)).max() > 1e-3
    for name in cond.keys() - {"text", "mask"}:
        assert jnp.abs(out - apply(variables, x, t, cond | {name: cond[name] - 1})).max() > 1e-3, name


def test_a_new_flow_map_is_the_same_for_every_target():
    variables = fresh(CROSS)
    embedding = variables["params"]["emb"]["to_embedding"]["linear_2"]
    assert not np.any(embedding["kernel"]) and not np.any(embedding["bias"])


def test_heads_of_128_reach_attention_as_they_are(monkeypatch):
    seen = []

    def record(q, *rest):
        seen.append(q.shape)
        return attention(q, *rest)

    monkeypatch.setattr("diffusion_jax.models.attention.attention", record)
    network = JOINT.clone(attention_head_dim=128, axes_dims_rope=(32, 48, 48), num_layers=1)
    jax.eval_shape(network.apply, shapes_of(network), *inputs(network))
    assert seen[-1] == (2, 5 + 16, 2, 128)


def test_learned_positions_are_interpolated_for_another_size():
    variables = randomised(CROSS)
    assert variables["params"]["pos_embed"]["positions"].shape == (4, 4, 16)
    assert jax.eval_shape(CROSS.apply, variables, *inputs(CROSS, (16, 12))).shape == (2, 16, 12, 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modulation": "film"}, "modulation must be one of"),
        ({"axes_dims_rope": (4, 2)}, "add up to attention_head_dim = 8"),
        ({"axes_dims_rope": (2, 2, 2, 2)}, "up to three widths"),
        ({"positions": "learned", "sample_size": None}, "needs sample_size"),
        ({"num_layers": 0}, "at least 1"),
        ({"text": "cross"}, "cross_attention_dim"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        network = SMALL.clone(**fields)
        jax.eval_shape(network.init, jax.random.key(0), *inputs(network))


@pytest.mark.parametrize(
    "size, channels, message", [((8, 7), 3, "multiples of patch_size = 2"), ((8, 8), 4, "3 input")]
)
def test_images_that_do_not_fit_are_refused(size, channels, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.apply, shapes_of(SMALL), jnp.zeros((1, *size, channels)), jnp.zeros(1))


def test_a_wrong_condition_is_refused():
    x, t, cond = inputs(CROSS)
    for wrong in ({}, cond | {"label": jnp.zeros(2)}, cond | {"text": jnp.zeros((2, 5, 7))}):
        with pytest.raises(ValueError, match="Transformer: expected a"):
            jax.eval_shape(CROSS.apply, shapes_of(CROSS), x, t, wrong)


def test_choices_name_fields():
    assert all(hasattr(SMALL, field) for field in transformers.CHOICES)
