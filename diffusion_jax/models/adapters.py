"""What training changes of a network's variables: all of them, or low-rank updates beside them (`models.lora`)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Key, PyTree

from diffusion_jax.models import lora as low_rank


class Adapter(NamedTuple):
    """split: (variables, key) -> (trained, rest). What training begins with, and what it leaves alone.

    join: (trained, rest) -> the variables that the network computes with.
    """

    split: Callable[[PyTree, Key[Array, ""]], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]


WHOLE = Adapter(lambda variables, key: (variables, {}), lambda trained, rest: trained)


def lora(rank: int, scale: float, targets: str = low_rank.ATTENTION) -> Adapter:
    """Low-rank updates alone are trained.

    rank, targets: as in `models.lora.init`, also for errors.
    scale: alpha / rank.
    """
    return Adapter(
        lambda variables, key: (low_rank.init(variables, rank, key, targets), variables),
        lambda trained, rest: low_rank.added(rest, trained, scale),
    )
