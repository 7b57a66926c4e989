"""The cost of attention over the pixels of an image on a TPU, by implementation, as estimated by the TPU compiler.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_attention --topology=v5e:1x1

No TPU is needed. One guided image in bfloat16, 8 heads of each width, input and output with the heads of a pixel side
by side, as in the network. Prints for each implementation the bytes of temporary arrays in HBM, the bytes that its
operations read and write, FLOPs (a star: the body of a loop counts once), and the compiler's estimate of the time,
which is not a measurement. The compiler has no estimate for a kernel; the time of its FLOPs at the chip's peak, a lower
bound, is added.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from benchmarks import quick, tpu
from diffusion_jax.compilation import planned_for
from diffusion_jax.models.attention import attention

BATCH, HEADS, LANES = 2, 8, 128
WIDTHS, TOKENS = (40, 64, 80, 160), (4096, 1024, 256)
LARGEST_TILE = 512  # pixels in a tile of the kernel; its default, 128, makes 16 times as many steps

Heads = Float[Array, "batch pixels heads width"]


def padded(q: Heads, k: Heads, v: Heads) -> Heads:
    """One softmax, with heads padded with zeros to a multiple of 128."""
    width = q.shape[-1]
    wide = _fill(q)
    scale = math.sqrt(wide.shape[-1] / width)  # `attention` divides by the root of the width it sees
    return attention(wide * scale, _fill(k), _fill(v), implementation="xla")[..., :width]


def flash(q: Heads, k: Heads, v: Heads) -> Heads:
    """The kernel that comes with JAX, which keeps the scores in the chip."""
    tile = min(LARGEST_TILE, q.shape[1])
    sizes = BlockSizes(block_q=tile, block_k_major=tile, block_k=tile, block_b=1)
    heads_first = (_fill(h).swapaxes(1, 2) for h in (q, k, v))
    out = flash_attention(*heads_first, sm_scale=1 / math.sqrt(q.shape[-1]), block_sizes=sizes)
    return out.swapaxes(1, 2)[..., : q.shape[-1]]


def _fill(h):
    return jnp.pad(h, [(0, 0)] * 3 + [(0, -h.shape[-1] % LANES)])


IMPLEMENTATIONS = {
    "xla": lambda q, k, v: attention(q, k, v, implementation="xla"),
    "blocks": lambda q, k, v: attention(q, k, v, implementation="blocks"),
    "padded": padded,
    "flash": flash,
}


@planned_for("tpu")
def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="one chip, such as v5e:1x1 or v6e:1x1")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="channels of a head")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="pixels")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    args = parser.parse_args()
    quick.note(args.quick)
    if args.quick:
        args.tokens, args.widths = [256], [40]
    columns = "pixels", "head", "implementation", "temporary", "read and written", "FLOPs", "expected"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for tokens in args.tokens:
        for width in args.widths:
            for name in args.only:
                report(name, tokens, width, args.topology)


def report(name: str, tokens: int, width: int, topology: str) -> None:
    """Compile one case for a chip and print a row."""
    cost, chip = tpu.cost(compiled(name, tokens, width, topology)), tpu.chip(topology)
    seconds = cost.cycles / tpu.clock(topology)
    time_text = f"{1e6 * seconds:.0f} us"
    if name == "flash":
        kernel = 4 * BATCH * HEADS * tokens**2 * (width + -width % LANES) / chip.flops
        time_text = f"at least {1e6 * (seconds + kernel):.0f} us, {1e6 * kernel:.0f} of them the kernel"
    once = " *" if name == "blocks" else ""
    print(
        f"| {tokens} | {width} | {name} | {cost.temporary / 1e6:.0f} MB | {cost.accessed / 1e6:.0f} MB{once} | "
        f"{cost.flops / 1e9:.1f} G{once} | {time_text} |",
        flush=True,
    )


def compiled(name: str, tokens: int, width: int, topology: str):
    """Attention of pixels to themselves for one chip: q, k and v of shape (batch, pixels, heads x width)."""
    place = SingleDeviceSharding(np.array(tpu.devices(topology)).flat[0])

    def run(*projected):
        q, k, v = (h.reshape(BATCH, tokens, HEADS, width) for h in projected)
        return IMPLEMENTATIONS[name](q, k, v).reshape(BATCH, tokens, HEADS * width)

    shape = jax.ShapeDtypeStruct((BATCH, tokens, HEADS * width), jnp.bfloat16)
    return jax.jit(run, in_shardings=place, out_shardings=place).lower(shape, shape, shape).compile()


if __name__ == "__main__":
    main()
