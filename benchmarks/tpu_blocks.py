"""Where the time of Stable Diffusion 1.5 goes on a TPU, by block, as estimated by the TPU compiler.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_blocks --topology=v5e:1x1

No TPU is needed. One guided image in bfloat16. Prints for each block its FLOPs as written, the time of these at 40 %
of the chip's peak, the compiler's estimate, and what of it is products, moves (copies, padding, repetition, slices) and
all else. The compiler has no estimate for attention's fused kernel; the time of its products at peak, a lower bound
that counts heads as a multiple of 128 wide, is a column of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks import quick, tpu
from diffusion_jax.compilation import planned_for
from diffusion_jax.flops import flops
from diffusion_jax.models.attention import BasicTransformerBlock
from diffusion_jax.models.layers import ResnetBlock2D

IMAGES, HEADS, TEXT, TIME = 2, 8, (77, 768), 1280
SIZES = {64: 320, 32: 640, 16: 1280, 8: 1280}  # side -> channels
UTILISATION = 0.4


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def residual(images: int, side: int, channels: int):
    return ResnetBlock2D(channels, dtype=jnp.bfloat16), array(images, side, side, channels), array(images, TIME)


def transformer(images: int, side: int, channels: int, attention: str):
    block = BasicTransformerBlock(HEADS, dtype=jnp.bfloat16, implementation=attention)
    return block, array(images, side**2, channels), array(images, *TEXT)


@planned_for("tpu")
def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="one chip, such as v5e:1x1 or v6e:1x1")
    parser.add_argument("--images", type=int, default=IMAGES, help="two for each guided image")
    parser.add_argument("--sides", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    quick.note(args.quick)
    columns = (
        "block",
        "FLOPs",
        f"at {UTILISATION:.0%}",
        "estimate",
        "products",
        "moves",
        "all else",
        "kernel",
        "temporary",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for side in [8] if args.quick else args.sides:
        channels = 32 if args.quick else SIZES[side]
        report(f"residual, {side} x {side} x {channels}", args.topology, 0, *residual(args.images, side, channels))
        width = -(-channels // HEADS // 128) * 128
        kernel = 4 * args.images * HEADS * side**4 * width / tpu.chip(args.topology).flops
        for attention in ("xla", "auto") if side > 8 else ():  # Stable Diffusion has no attention at 8 x 8
            inputs = transformer(args.images, side, channels, attention)
            report(f"transformer, {side} x {side} x {channels}, {attention}", args.topology, kernel, *inputs)


def report(name: str, topology: str, kernel: float, module, *inputs: jax.ShapeDtypeStruct) -> None:
    """Compile a block for a chip and print a row. kernel: seconds of its fused attention, if it has one."""
    place = SingleDeviceSharding(np.array(tpu.devices(topology)).flat[0])
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda leaf: array(*leaf.shape), shapes)
    compiled = jax.jit(module.apply, in_shardings=place, out_shardings=place).lower(params, *inputs).compile()
    program, count = compiled.as_text(), flops(module.apply, params, *inputs)
    every, products, moves = (
        1e6 * tpu.cycles(program, counts) / tpu.clock(topology)
        for counts in (lambda line: True, tpu.is_product, tpu.is_move)
    )
    expected = 1e6 * count / (UTILISATION * tpu.chip(topology).flops)
    fused = f"at least {1e6 * kernel:.0f} us" if "tpu_custom_call" in program else "none"
    print(
        f"| {name} | {count / 1e9:.1f} G | {expected:.0f} us | {every:.0f} us | {products:.0f} us | {moves:.0f} us | "
        f"{every - products - moves:.0f} us | {fused} | {tpu.cost(compiled).temporary / 1e6:.0f} MB |",
        flush=True,
    )


if __name__ == "__main__":
    main()
