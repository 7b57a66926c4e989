"""Matrix products and convolutions, each in the form that is fastest on the current backend."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from diffusion_jax.compilation import backend

Padding = Sequence[tuple[int, int]]
SAME = [(1, 1)] * 2


def convolve(
    x: Num[Array, "batch height width channels"],
    kernel: Num[Array, "kernel_height kernel_width channels features"],
    padding: Padding,
    stride: int = 1,
) -> Num[Array, "batch h w features"]:
    """A convolution. On CPU, 3x3 convolutions of many channels use Winograd's algorithm, and those of large images
    have a kernel gradient of their own: XLA's take up to twice as long.

    padding: (before, after) for height and for width.
    """
    same = kernel.shape[:2] == (3, 3) and stride == 1 and [tuple(sides) for sides in padding] == SAME
    if same and _is_large(kernel, math.prod(x.shape[:3]), x.dtype):
        return _minimal(x, kernel)
    if same and _has_many_pixels(x, kernel):
        return _same(x, kernel)
    return _convolve(x, kernel, padding, stride)


def convolve_repeated(
    x: Num[Array, "batch height width channels"],
    kernel: Num[Array, "3 3 channels features"],
    size: tuple[int, int] | None = None,
) -> Num[Array, "batch h w features"]:
    """A 3x3 convolution, padded by 1, of an image with every pixel repeated twice in both directions.

    size: (height, width). Crop the repeated image to it before the convolution.
    Each output pixel depends on only 2x2 different input pixels. So this is four 2x2 convolutions of the small image,
    one for each parity of row and column, with summed kernel taps: 16 products instead of 36, and 9 on CPU.
    """
    b, h, w, _ = x.shape
    pixels = 4 * b * h * w
    cut = size not in (None, (2 * h, 2 * w))  # the crop then splits a repeated pixel
    if not cut and _is_large(kernel, pixels, x.dtype):
        return _minimal_repeated(x, kernel.astype(x.dtype))
    if cut or pixels < kernel.shape[-1]:  # for a large kernel and a small image, summing the taps would cost most
        height, width = size or (2 * h, 2 * w)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
        return convolve(x, kernel.astype(x.dtype), SAME)
    return _convolve_repeated(x, kernel)


def multiply(
    x: Num[Array, "*batch channels"], kernel: Num[Array, "channels features"]
) -> Float[Array, "*batch features"]:
    """x · kernel. On CPU the result is float32, because XLA multiplies bfloat16 into float32 three times as fast.

    All axes of x but the last are merged first: XLA on CPU then computes the kernel's gradient up to twice as fast.
    """
    sums = jnp.promote_types(x.dtype, jnp.float32) if backend() == "cpu" else None
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=sums)
    return y.reshape(*x.shape[:-1], -1)


def _convolve(x, kernel, padding, stride=1):
    """On CPU: one product if the kernel is larger than the image or the batch of images, for which XLA takes up to 30
    times as long, and one for each tap for many channels in bfloat16.
    """
    size = [(n + sum(pad) - k) // stride + 1 for n, pad, k in zip(x.shape[1:3], padding, kernel.shape, strict=False)]
    few = math.prod(size) < max(math.prod(kernel.shape[:2]), kernel.shape[-1] / len(x))
    wide = x.dtype == jnp.bfloat16 and x.shape[-1] > 256
    if backend() != "cpu" or not (few or wide):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    padded = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    tops, lefts = (
        [slice(i, i + stride * (n - 1) + 1, stride) for i in range(k)] for n, k in zip(size, kernel.shape, strict=False)
    )
    patches = [padded[:, top, left] for top in tops for left in lefts]
    taps = kernel.reshape(-1, *kernel.shape[2:])
    if few:
        patches, taps = [jnp.concatenate(patches, axis=-1)], taps.reshape(1, -1, kernel.shape[-1])
    return sum(map(multiply, patches, taps)).astype(x.dtype)


def _convolve_repeated(x, kernel):
    b, h, w, _ = x.shape
    rows = []
    for i in range(2):
        taps = [_repeated_taps(_repeated_taps(kernel, 0, i), 1, j).astype(x.dtype) for j in range(2)]
        columns = [_convolve(x, taps[j], [(1 - i, i), (1 - j, j)]) for j in range(2)]
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _repeated_taps(kernel, axis, parity):
    """Sum three taps over repeated pixels to two over pixels: even outputs see [x-1 | x x], odd ones [x x | x+1]."""
    left, middle, right = jnp.split(kernel, 3, axis)
    pair = [left, middle + right] if parity == 0 else [left + middle, right]
    return jnp.concatenate(pair, axis)


def _by_columns(x, kernel):
    """A 3x3 convolution, padded by 1: a product for each column of the kernel, whose rows are added one pixel apart.

    Slower than XLA's, but its transpose, the kernel's gradient, is three large products.
    """
    b, h, w, channels = x.shape
    padded = jnp.pad(x, [(0, 0), *SAME, (0, 0)])
    taps = kernel.transpose(1, 2, 0, 3).reshape(3, channels, -1)
    rows = sum(multiply(padded[:, :, j : j + w], taps[j]) for j in range(3)).reshape(b, h + 2, w, 3, -1)
    return sum(rows[:, i : i + h, :, i] for i in range(3)).astype(x.dtype)


def _in_kernel(x, kernel):
    """A 3x3 convolution, padded by 1, in the form whose kernel gradient is fastest."""
    return _by_columns(x, kernel) if _has_many_pixels(x, kernel) else _convolve(x, kernel, SAME)


def _has_many_pixels(x, kernel):
    many = math.prod(x.shape[:3]) >= 8192 and min(kernel.shape[2:]) >= 32
    return backend() == "cpu" and many


def _is_large(kernel, pixels, dtype):
    """Whether a convolution on CPU saves more by fewer products than the extra sums cost."""
    large = min(kernel.shape[2:]) >= 256 and pixels >= 512
    return backend() == "cpu" and large and dtype == jnp.float32


class Filtering(NamedTuple):
    """Two output pixels of a 1D convolution with three taps, by fewer than six products (Winograd 1980).

    The result is pixels(tile(d) * taps(g)) for inputs d and taps g.
    inputs: number of inputs d for two output pixels.
    step: inputs from one pair of output pixels to the next.
    """

    inputs: int
    step: int
    tile: Callable
    taps: Callable
    pixels: Callable


# F(2, 3) of Lavin & Gray 2015, section 4.1. With repeated pixels d0 d1 | d1 d2 one of its products is 0.
MINIMAL = Filtering(
    inputs=4,
    step=2,
    tile=lambda d: [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]],
    taps=lambda g: [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]],
    pixels=lambda m: [m[0] + m[1] + m[2], m[1] - m[2] - m[3]],
)
MINIMAL_REPEATED = Filtering(
    inputs=3,
    step=1,
    tile=lambda d: [d[0] - d[1], d[1], d[1] - d[2]],
    taps=lambda g: [g[0], g[0] + g[1] + g[2], g[2]],
    pixels=lambda m: [m[0] + m[1], m[1] - m[2]],
)


def _filter(filtering, x, kernel):
    """Filter rows and columns: 2x2 output pixels from each tile of x (Lavin & Gray 2015, eq. 8).

    Works on one row of the filtered tiles at a time, so that no array is larger than x, the kernel and the result.
    """
    inputs, step, tile, taps, pixels = filtering
    b, height, width, _ = x.shape
    rows, columns = -(-height // step), -(-width // step)
    padded = jnp.pad(x, [(0, 0), (1, 1 + height % step), (1, 1 + width % step), (0, 0)])

    def add(state, following):
        y, (of_tile, of_taps, of_pixels) = state
        line = sum(of_tile[i] * padded[:, i : i + step * (rows - 1) + 1 : step] for i in range(inputs))
        tiles = tile([line[:, :, j : j + step * (columns - 1) + 1 : step] for j in range(inputs)])
        kernels = taps([sum(of_taps[i] * kernel[i, j] for i in range(3)) for j in range(3)])
        pair = jnp.stack(pixels(list(map(multiply, tiles, kernels))), axis=3)
        return (y + of_pixels[:, None] * pair.reshape(b, rows, 1, -1), following), None

    units = [np.eye(n, dtype=np.float32) for n in (inputs, 3, inputs)]
    matrices = np.stack(tile(units[0])), np.stack(taps(units[1])), np.stack(pixels(units[2]), axis=1)
    y = jnp.zeros((b, rows, 2, columns * 2 * kernel.shape[-1]), x.dtype)
    # the row is part of the state: XLA on CPU would read a scanned input again for every number
    first, following = [m[0] for m in matrices], [np.roll(m, -1, axis=0) for m in matrices]
    (y, _), _ = jax.lax.scan(add, (y, first), following)
    size = [n * 2 // step for n in (height, width)]
    return y.reshape(b, 2 * rows, 2 * columns, -1)[:, : size[0], : size[1]]


def _bilinear(function, in_x, in_kernel):
    """`function` with the derivatives of `in_x` in x and of `in_kernel` in the kernel, which XLA transposes.

    All three are the same function, linear in each argument.
    """
    function = jax.custom_jvp(function)

    @function.defjvp
    def jvp(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        return function(x, kernel), in_x(dx, kernel) + in_kernel(x, dkernel)

    return function


_padded = functools.partial(_convolve, padding=SAME)
_same = _bilinear(_padded, _padded, _in_kernel)
_minimal = _bilinear(functools.partial(_filter, MINIMAL), _padded, _in_kernel)
_minimal_repeated = _bilinear(functools.partial(_filter, MINIMAL_REPEATED), *[_convolve_repeated] * 2)
