"""Count the FLOPs of a computation before it is compiled."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval
from jaxtyping import PyTree


def flops(function: Callable, *args: PyTree) -> float:
    """The FLOPs of `function(*args)` on all devices: two for each multiplication of a matrix product or a convolution.

    - What is computed again for a gradient counts again.
    - Other operations do not count. They are about a hundredth for a network.
    - A scan counts as often as it runs. A loop whose length is known only at run time counts once.
    - The most expensive branch of a condition counts.
    - A convolution's multiplications by padding do not count.
    - The FLOPs depend on the backend, because networks choose the form of their operations by it.

    args: arrays or their shapes (`jax.ShapeDtypeStruct`).
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> float:
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(map(_of_equation, needed.eqns))


def _of_equation(equation: JaxprEqn) -> float:
    params = equation.params
    name = equation.primitive.name.removesuffix("_wrapper")
    if name in LEAVES:
        return LEAVES[name](*[variable.aval.shape for variable in (*equation.invars[:2], equation.outvars[0])], params)
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * _repeats(name, params)


def _repeats(name: str, params: dict[str, Any]) -> int:
    """How often what is inside an operation is computed, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _product(lhs: tuple, rhs: tuple, out: tuple, params: dict[str, Any]) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution(lhs: tuple, rhs: tuple, out: tuple, params: dict[str, Any]) -> float:
    numbers = params["dimension_numbers"]
    taps = [
        _taps(lhs[numbers.lhs_spec[i + 2]], rhs[numbers.rhs_spec[i + 2]], out[numbers.out_spec[i + 2]], *window)
        for i, window in enumerate(
            zip(
                params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True
            )
        )
    ]
    images = lhs[numbers.lhs_spec[0]] // params["batch_group_count"]
    features, channels = (rhs[numbers.rhs_spec[i]] for i in (0, 1))
    return 2.0 * images * features * channels * math.prod(taps)


def _taps(
    size: int, kernel: int, out: int, stride: int, padding: tuple[int, int], dilation: int, kernel_dilation: int
) -> int:
    """The pairs of an output pixel and a number of the kernel along one axis that multiply a pixel of the input."""
    pixel = stride * np.arange(out)[:, None] + kernel_dilation * np.arange(kernel) - padding[0]
    return int(np.sum((pixel >= 0) & (pixel <= (size - 1) * dilation) & (pixel % dilation == 0)))


def _attention(products: int) -> Callable[..., float]:
    """Of cuDNN's attention: the number of products with as many multiplications as queries · keysᵀ."""

    def count(queries: tuple, keys: tuple, out: tuple, params: dict[str, Any]) -> float:
        length = 2 if params["layout"] else 1  # (batch, heads, length, width), else (batch, length, heads, width)
        return 2.0 * products * math.prod(queries) * keys[length]

    return count


LEAVES: dict[str, Callable[..., float]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd": _attention(2),
    "dot_product_attention_bwd": _attention(5),
}
