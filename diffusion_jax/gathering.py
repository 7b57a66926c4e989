"""The loss of divided weights: each is gathered where it is used, and again for the gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, primitives
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

SHARDS = "shards"  # the axis of the mesh whose devices hold different examples and different parts of the weights
WHOLE = -1  # instead of the axis of an array that every device holds whole
FORMS = (primitives.reshape_p, primitives.transpose_p)  # of the same weight


class _Part(NamedTuple):
    """A weight of which a device holds a part.

    axis: that along which the weight is divided.
    dtype: of the weight when it is gathered.
    form: the gathered weight -> the form in which it is used.
    """

    part: Array
    axis: int
    dtype: DTypeLike
    form: Callable[[Array], Array] = lambda weight: weight

    def whole(self) -> Array:
        return self.form(_gathered(self.part, self.axis, self.dtype))

    def converted(self, dtype: DTypeLike) -> "_Part":
        """The same in another type; in a smaller one less is sent."""
        if jnp.dtype(dtype).itemsize < jnp.dtype(self.dtype).itemsize:
            return self._replace(dtype=dtype)
        return self.formed(lambda weight: weight.astype(dtype))

    def formed(self, change: Callable[[Array], Array]) -> "_Part":
        """The same in another form."""
        return self._replace(form=lambda weight: change(self.form(weight)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(part: Array, axis: int, dtype: DTypeLike) -> Array:
    """The weight of type `dtype`. The parts of its gradient are added up in the type of the parts."""
    return jax.lax.all_gather(part.astype(dtype), SHARDS, axis=axis, tiled=True)


def _gathered_forward(part: Array, axis: int, dtype: DTypeLike) -> tuple[Array, Array]:
    return _gathered(part, axis, dtype), part[:0]


def _gathered_backward(axis: int, dtype: DTypeLike, empty: Array, gradient: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient.astype(empty.dtype), SHARDS, scatter_dimension=axis, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, _Part) else value


def gathering(axes: PyTree, whole: PyTree, loss: Callable) -> Callable:
    """The loss of arrays that are divided over devices.

    It gathers each array where it is used, and gathers it again for the gradient instead of keeping it. So a device
    holds few whole weights at a time. Everything else is kept for the gradient. From within a `jax.checkpoint` of the
    loss, such as a block of a network with `remat`, only the results are kept.

    axes: the axis along which each array is divided, or WHOLE.
    whole: the arrays or their shapes before they were divided.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)

    def part(array: Array, axis: int) -> Array | _Part:
        return array if axis == WHOLE else _Part(array, axis, array.dtype)

    def divided_loss(params: PyTree, inputs: PyTree, *rest: Any) -> Any:
        computation, result = jax.make_jaxpr(loss, return_shape=True)(*shapes, *rest)

        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_any_names_but_these())
        def evaluate(arrays: list[Array], rest: list[Array]) -> list[Array]:
            parts = map(part, arrays, jax.tree.leaves(axes))
            return [_whole(value) for value in _evaluate(computation.jaxpr, computation.consts, [*parts, *rest], _kept)]

        values = evaluate(jax.tree.leaves((params, inputs)), jax.tree.leaves(rest))
        return jax.tree.unflatten(jax.tree.structure(result), values)

    return divided_loss


def _kept(result: Array) -> Array:
    return checkpoint_name(result, "kept")


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], mark: Callable[[Array], Array]
) -> list[Array | _Part]:
    """Evaluate a computation of arrays and parts of weights. Weights are gathered where they are used.

    mark: applied to every result but gathered weights, other forms of them, and what a checkpoint of the computation
      computes inside. With `_kept`, a checkpoint around the computation keeps these results alone. Its policy could not
      tell them apart, because it also decides about the inside of every inner checkpoint.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _results(equation, [value(variable) for variable in equation.invars], mark)
        values.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _results(equation: JaxprEqn, inputs: list[Any], mark: Callable[[Array], Array]) -> list[Any]:
    """The results of one step of a computation, see `_evaluate`."""
    primitive, params = equation.primitive, equation.params

    def apply(*inputs: Any) -> list[Array]:
        results = primitive.bind(*inputs, **primitive.get_bind_params(params))
        return results if primitive.multiple_results else [results]

    if primitive is primitives.jit_p:
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs, mark)
    if isinstance(inputs[0] if inputs else None, _Part):
        if primitive is primitives.convert_element_type_p:
            return [inputs[0].converted(params["new_dtype"])]
        if primitive in FORMS:
            return [inputs[0].formed(lambda weight: apply(weight)[0])]
    if primitive is primitives.scan_p and any(isinstance(value, _Part) for value in inputs):
        return _scan(equation, inputs, mark)
    if primitive is primitives.remat_p and not params["differentiated"]:
        return [mark(result) for result in _checkpoint(params, inputs)]
    return [mark(result) for result in apply(*map(_whole, inputs))]


def _scan(equation: JaxprEqn, inputs: list[Any], mark: Callable[[Array], Array]) -> list[Array]:
    """The same scan. A weight that it takes in slices, such as that of equal layers, is gathered slice by slice."""
    params, inner = equation.params, equation.params["jaxpr"].jaxpr
    # constants, the carry and slices come in this order; slices alone have an axis less inside
    after = len(inputs) - sum(map(_has_axis_less, equation.invars, inner.invars))
    first = after - len(inner.outvars) + sum(map(_has_axis_less, equation.outvars, inner.outvars))
    sliced = [value if _has_divided_slices(value) else _whole(value) for value in inputs[after:]]
    fixed, initial = [*map(_whole, inputs[:first])], [*map(_whole, inputs[first:after])]

    def body(carry: list[Array], slices: list[Array]) -> tuple[list[Array], list[Array]]:
        pairs = zip(sliced, slices, strict=True)
        parts = [old._replace(part=new, axis=old.axis - 1) if isinstance(old, _Part) else new for old, new in pairs]
        results = _evaluate(inner, params["jaxpr"].consts, [*fixed, *carry, *parts], mark)
        return [*map(_whole, results[: len(carry)])], [*map(_whole, results[len(carry) :])]

    arrays = [value.part if isinstance(value, _Part) else value for value in sliced]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(body, initial, arrays, **options)
    return [mark(result) for result in [*carry, *results]]


def _has_axis_less(outside: Any, inside: Any) -> bool:
    return inside.aval.ndim < outside.aval.ndim


def _has_divided_slices(value: Any) -> bool:
    return isinstance(value, _Part) and value.axis > 0 and value.form is _Part._field_defaults["form"]


def _checkpoint(params: dict[str, Any], inputs: list[Any]) -> list[Array]:
    """The same checkpoint with its weights gathered inside."""

    @functools.partial(jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"])
    def block(*arrays: Array) -> list[Array]:
        pairs = zip(inputs, arrays, strict=True)
        parts = [old._replace(part=array) if isinstance(old, _Part) else array for old, array in pairs]
        return [_whole(value) for value in _evaluate(params["jaxpr"], (), parts, lambda result: result)]

    return block(*(value.part if isinstance(value, _Part) else value for value in inputs))
