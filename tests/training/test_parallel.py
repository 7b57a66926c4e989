"""Strategies: a step divided over devices is the step of one device, and each device holds its part alone."""

import functools
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params, primitives
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import build, parallel
from diffusion_jax.training import step as steps
from tests import device_flags

WIDTH, STEPS = 160, 20  # a kernel of WIDTH x WIDTH is large enough to be divided
STRATEGIES = ("pmap", "fsdp", "fsdp=4", "fsdp=1")


def in_eight_devices(function):
    """Call a test module's function in a process of its own, where the host shows 8 devices."""
    environment = os.environ | {"XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu"}
    code = f"from {function.__module__} import {function.__name__} as f; f()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def initial():
    first, second = jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return {"first": first, "second": second, "bias": jnp.zeros(WIDTH)}


def loss(params, frozen, batch, keys):
    """Two layers between two frozen maps, with noise of each example's own."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    hidden = jnp.tanh(batch["x"] @ frozen["map"] @ params["first"] + params["bias"])
    error = jnp.mean(jnp.square(hidden @ params["second"] - batch["x"] - 0.3 * noise), axis=1)
    return jnp.mean(error), {"mse": jnp.mean(error)}


def loss_in_bfloat16(params, frozen, batch, keys):
    """The same with its products in bfloat16, as networks have them."""
    half = {name: params[name].astype(jnp.bfloat16) for name in ("first", "second")} | {"bias": params["bias"]}
    batch = {"x": batch["x"].astype(jnp.bfloat16)}
    value, metrics = loss(half, {"map": frozen["map"].astype(jnp.bfloat16)}, batch, keys)
    return value.astype(jnp.float32), metrics


FROZEN = {"map": np.asarray(np.eye(WIDTH) * 1.5, np.float32)}


def clipped_muon():
    section = ConfigDict(
        {"kind": "muon", "learning_rate": 1e-3, "warmup": 1, "decay": "constant", "clip": 0.1, "weight_decay": 0.1}
        | {"b1": 0.9, "b2": 0.99}
    )
    return build.objective.optimizer(section, STEPS)


def train(strategy, accumulate=1, optimizer=None):
    """(losses, state) of 20 steps on the same records."""
    optimizer = optimizer or optax.adam(1e-3)
    train_step = steps.make_train_step(loss, optimizer, 0.9, accumulate, strategy)
    state = strategy.create(lambda params: steps.init_state(params, optimizer, 0, True), jax.device_get(initial()))
    frozen, losses = strategy.place(FROZEN), []
    for step in range(STEPS):
        batch = {"x": np.random.default_rng(step).normal(size=(32, WIDTH)).astype(np.float32)}
        state, metrics = train_step(state, frozen, strategy.split(batch))
        losses.append(metrics["loss"])
    return jax.device_get(losses), state


def all_strategies_are_one_device():
    assert jax.device_count() == 8
    losses, one = train(parallel.strategy("pmap", jax.devices()[:1]))
    assert losses[-1] < 0.97 * losses[0]
    for name in STRATEGIES:
        for accumulate in (1, 2):
            got, state = train(parallel.strategy(name), accumulate)
            np.testing.assert_allclose(got, losses, rtol=1e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(state), jax.device_get(one)
            )


def muon_and_clipping_see_whole_gradients():
    (losses, one), (got, state) = (
        train(strategy, 1, clipped_muon())
        for strategy in (parallel.strategy("pmap", jax.devices()[:1]), parallel.strategy("fsdp"))
    )
    np.testing.assert_allclose(got, losses, rtol=1e-6)
    params = zip(*(jax.tree.leaves(jax.device_get(each.params)) for each in (state, one)), strict=True)
    for a, b in params:
        np.testing.assert_allclose(a, b, atol=1e-5)


def a_device_holds_its_part():
    size = WIDTH * WIDTH
    for name, part in (("pmap", size), ("fsdp", size // 8), ("fsdp=4", size // 4), ("fsdp=2", size // 2)):
        state = train(parallel.strategy(name))[1]
        kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.size == size]
        assert len(kernels) == 2 * (2 + 2 + 2)  # weights and their average, Adam's moments, two averages more
        assert all(len(leaf.addressable_shards) == 8 for leaf in kernels)
        assert {shard.data.size for leaf in kernels for shard in leaf.addressable_shards} == {part}


def a_broken_example_is_every_devices_skipped_step():
    for name in ("pmap", "fsdp"):
        strategy, optimizer = parallel.strategy(name), optax.sgd(1.0)
        train_step = steps.make_train_step(loss, optimizer, 0.9, 1, strategy)
        state = strategy.create(lambda params: steps.init_state(params, optimizer, 0), initial())  # noqa: B023
        batch = {"x": np.ones((32, WIDTH), np.float32)}
        batch["x"][3, 5] = np.nan
        state, metrics = train_step(state, strategy.place(FROZEN), strategy.split(batch))
        assert metrics["bad_steps"] == 1 and np.isnan(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(initial()))


def deep_loss(block, params, frozen, batch, keys):
    """Residual blocks with activations that are wider than their results."""
    x = batch["x"]
    for layer in params["layers"]:
        x = block(layer, x)
    return jnp.mean(jnp.square(x - frozen["map"][0])), {}


def block(layer, x):
    return x + jnp.tanh(jnp.tanh(x @ layer["up"]) @ layer["up"].T) @ layer["down"]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def a_checkpoint_in_the_loss_keeps_only_its_results():
    """The backward pass of fsdp takes from the forward pass what that of one device would, and parts of weights."""
    strategy, optimizer, layers = parallel.strategy("fsdp"), optax.sgd(1.0), 3
    layer = {"up": jnp.ones((WIDTH, 3 * WIDTH)) / WIDTH, "down": jnp.eye(WIDTH)}
    initial, kept = {"layers": [layer] * layers}, {}
    for name, maybe_checkpointed in {"all": block, "results": jax.checkpoint(block)}.items():
        loss = functools.partial(deep_loss, maybe_checkpointed)
        state = strategy.shapes(jax.eval_shape(lambda: steps.init_state(initial, optimizer, 0)))
        batch = strategy.batch_shapes({"x": jax.ShapeDtypeStruct((32, WIDTH), "float32")})
        step = steps.make_train_step(loss, optimizer, 0.9, 1, strategy)
        backward = [
            equation
            for equation in equations(jax.make_jaxpr(step)(state, strategy.shapes(FROZEN), batch).jaxpr)
            if equation.primitive is primitives.remat_p and equation.params["differentiated"]
        ]
        kept[name] = Counter(variable.aval.shape for variable in backward[0].invars)
        assert len(backward) == (1 if name == "all" else 1 + layers), "its own checkpoints are still there"
        assert kept[name][WIDTH, 3 * WIDTH] == kept[name][WIDTH, WIDTH] == 0, "no whole weight"
        assert kept[name][WIDTH, 3 * WIDTH // 8] == layers, "but its part"
    assert kept["all"][4, 3 * WIDTH] >= layers
    assert kept["results"][4, 3 * WIDTH] == 0 < kept["results"][4, WIDTH] < kept["all"][4, WIDTH]


def scanned_loss(block, params, frozen, batch, keys):
    """The blocks of `deep_loss`, compiled once."""
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), batch["x"], params["layers"])
    return jnp.mean(jnp.square(x - frozen["map"][0])), {}


def layers_of_a_scan_are_gathered_one_by_one():
    layers, optimizer = 3, optax.sgd(0.1)
    up, down = jax.random.split(jax.random.key(0))
    up = jax.random.normal(up, (layers, WIDTH, 3 * WIDTH)) / np.sqrt(WIDTH)
    down = jax.random.normal(down, (layers, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    x = np.random.default_rng(0).normal(size=(32, WIDTH)).astype(np.float32)
    for each in (block, jax.checkpoint(block, prevent_cse=False)):
        loss, results = functools.partial(scanned_loss, each), []
        for strategy in (parallel.strategy("pmap", jax.devices()[:1]), parallel.strategy("fsdp")):
            initial = jax.device_get({"layers": {"up": up, "down": down}})
            state = strategy.create(lambda params: steps.init_state(params, optimizer, 0), initial)
            step, frozen, batch = (
                steps.make_train_step(loss, optimizer, 0.9, 1, strategy),
                strategy.place(FROZEN),
                strategy.split({"x": x}),
            )
            if strategy.sharding(up).spec != PartitionSpec():
                traced = jax.make_jaxpr(step)(state, frozen, batch).jaxpr
                gathers = [equation for equation in equations(traced) if equation.primitive.name == "all_gather"]
                gathered = {equation.outvars[0].aval.shape for equation in gathers}
                assert {(WIDTH, 3 * WIDTH), (WIDTH, WIDTH)} <= gathered and all(len(shape) < 3 for shape in gathered)
            results.append(jax.device_get(step(state, frozen, batch)[0].params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)


def test_layers_of_a_scan_are_gathered_one_by_one():
    in_eight_devices(layers_of_a_scan_are_gathered_one_by_one)


def test_a_checkpoint_in_the_loss_keeps_only_its_results():
    in_eight_devices(a_checkpoint_in_the_loss_keeps_only_its_results)


def test_every_strategy_is_one_device():
    in_eight_devices(all_strategies_are_one_device)


def test_muon_and_clipping_see_whole_gradients():
    in_eight_devices(muon_and_clipping_see_whole_gradients)


def test_a_device_holds_its_part():
    in_eight_devices(a_device_holds_its_part)


def test_a_broken_example_is_skipped_on_every_device():
    in_eight_devices(a_broken_example_is_every_devices_skipped_step)


@pytest.mark.parametrize("name", ["", "fsdp=0", "fsdp=-1", "fsdp=", "fsdp=x", "FSDP", "dp", "pmap=2", "fsdp=2=2"])
def test_an_unknown_strategy_is_one_clear_line(name):
    with pytest.raises(ValueError, match=r"train\.parallel must be pmap, fsdp or fsdp=N; got") as error:
        parallel.strategy(name)
    assert "\n" not in str(error.value)


def test_groups_must_divide_the_devices():
    with pytest.raises(ValueError, match="fsdp=3: 3 does not divide 1 devices"):
        parallel.strategy("fsdp=3", jax.devices()[:1])


@pytest.mark.parametrize("count, group", [(1, 1), (4, 4), (6, 6), (8, 8), (12, 12), (24, 8), (48, 16), (256, 32)])
def test_fsdp_chooses_its_groups(count, group):
    assert parallel.group("fsdp", count) == group


def test_devices_are_in_the_order_of_their_hosts():
    """A slice of 4 x 2 chips whose numbers run along rows, of two hosts that hold 2 x 2 each."""
    chips = [SimpleNamespace(id=i, process_index=i % 4 // 2) for i in range(8)]
    assert [chip.id for chip in parallel._by_host(chips)] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_arrays_that_are_there_are_not_placed_again(monkeypatch):
    tree = parallel.whole({"host": np.ones(3), "device": jnp.zeros(2)})
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("placed again"))
    again = parallel.whole(tree)
    assert all(again[name] is tree[name] for name in tree)
