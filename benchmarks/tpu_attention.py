"""The cost of attention on a TPU, by implementation, as estimated by the TPU compiler.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_attention --topology=v5e:1x1

No TPU is needed. bfloat16, input and output with the heads of a pixel side by side, as in the network. A case is
images, queries, keys, heads, and the width of a head; by default those of Stable Diffusion 1.5. Prints for each
implementation the bytes of temporary arrays in HBM, the bytes that its operations read and write, FLOPs (a star: the
body of a loop counts once), and the compiler's estimate of the time, which is not a measurement. The compiler has no
estimate for a kernel; the time of its products at the chip's peak, a lower bound that counts heads as a multiple of 128
wide, is added.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks import quick, tpu
from diffusion_jax.compilation import planned_for
from diffusion_jax.models.attention import attention

LANES = 128
CASES = (  # images, queries, keys, heads, width
    *("2,4096,4096,8,40", "2,1024,1024,8,80", "2,256,256,8,160", "2,4096,77,8,40"),  # one guided image
    "1,4096,4096,1,512",  # its decoder
    *("3,1024,1024,8,80", "4,1024,1024,8,80", "64,256,256,8,160", "32,4096,77,8,40"),  # more images
)
PRODUCTS = {False: 2, True: 9}  # of a kernel; its gradient computes the scores and their gradient twice more
IMPLEMENTATIONS = "xla", "blocks", "flash"


@planned_for("tpu")
def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="one chip, such as v5e:1x1 or v6e:1x1")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--gradient", action="store_true", help="also that of queries, keys and values")
    args = parser.parse_args()
    quick.note(args.quick)
    columns = (
        "images",
        "queries",
        "keys",
        "heads",
        "implementation",
        "temporary",
        "read and written",
        "FLOPs",
        "expected",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for case in ["1,128,128,1,8"] if args.quick else args.cases:
        for name in args.only:
            report(name, tuple(map(int, case.split(","))), args.gradient, args.topology)


def report(name: str, case: tuple[int, ...], gradient: bool, topology: str) -> None:
    """Compile one case for a chip and print a row."""
    images, queries, keys, heads, width = case
    cost, chip = tpu.cost(compiled(name, case, gradient, topology)), tpu.chip(topology)
    seconds = cost.cycles / tpu.clock(topology)
    time_text = f"{1e6 * seconds:.0f} us"
    if name == "flash":
        product = 2 * images * heads * queries * keys * (width + -width % LANES)
        kernel = PRODUCTS[gradient] * product / chip.flops
        time_text = f"at least {1e6 * (seconds + kernel):.0f} us, {1e6 * kernel:.0f} of them the kernel"
    once = " *" if name == "blocks" else ""
    print(
        f"| {images} | {queries} | {keys} | {heads} of {width} | {name} | {cost.temporary / 1e6:.0f} MB | "
        f"{cost.accessed / 1e6:.0f} MB{once} | {cost.flops / 1e9:.1f} G{once} | {time_text} |",
        flush=True,
    )


def compiled(name: str, case: tuple[int, ...], gradient: bool, topology: str):
    """Attention for one chip: q, k and v of shape (images, tokens, heads x width)."""
    images, queries, keys, heads, width = case
    place = SingleDeviceSharding(np.array(tpu.devices(topology)).flat[0])

    def run(*projected):
        q, k, v = (h.reshape(images, -1, heads, width) for h in projected)
        return attention(q, k, v, implementation=name).reshape(images, queries, heads * width)

    def gradients(*projected):
        return jax.grad(lambda *inputs: jnp.sum(jnp.square(run(*inputs).astype(jnp.float32))), (0, 1, 2))(*projected)

    shapes = [jax.ShapeDtypeStruct((images, n, heads * width), jnp.bfloat16) for n in (queries, keys, keys)]
    function = gradients if gradient else run
    return jax.jit(function, in_shardings=place, out_shardings=place).lower(*shapes).compile()


if __name__ == "__main__":
    main()
