"""Updates of one linear map or convolution, as files of LoRA and its relatives hold them.

    W <- W + s D                                 s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)
    W <- m (W + s D) / ||W + s D||               with a magnitude m (DoRA, Liu et al. 2024, eq. 5)

    LoRA    D = up down                          Hu et al. 2021. Of a convolution, down has its size and up is 1 x 1
            D = up * mid * down                  LoCon with a Tucker core (Yeh et al. 2023): only mid has its size
    LoHa    D = (w1_a w1_b) (w2_a w2_b)          product of elements (FedPara, Hyeon-Woo et al. 2022, prop. 1)
    LoKr    D = w1 (x) w2                        Kronecker product (KronA, Edalati et al. 2022); w1 may be w1_a w1_b,
                                                 and w2 likewise

In LoHa and LoKr of convolutions, w_b is flat, (rank, in h w), or a core t (rank, rank, h, w) stands between w_a and
w_b.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.interop.originals import WHOLE, Rows

Factors = Mapping[str, np.ndarray]


class Kind(NamedTuple):
    """A way to write D.

    complete: sets of factors that suffice.
    optional: factors that may come in addition.
    ranked: factors whose first axis is the rank, if they are there.
    change: (**factors) -> D, (out, in, …) or (out, in · …).
    """

    complete: tuple[frozenset[str], ...]
    optional: frozenset[str]
    ranked: tuple[str, ...]
    change: Callable[..., np.ndarray]

    @property
    def names(self) -> frozenset[str]:
        """All factors that it knows."""
        return self.optional.union(*self.complete)


class Update(NamedTuple):
    """An update of one map.

    kind: its name in `KINDS`.
    factors: the arguments of `Kind.change`.
    alpha: numerator of the scale. None if the file does not give it: the scale is then 1.
    rank: of its factors, or that of the settings for an update that has no low rank.
    rank_stabilized: divide alpha by sqrt(rank) instead of by rank.
    magnitude: of DoRA, one number for each output, or one for each input; None without.
    rows: those of D and of the magnitude that the map has, where the file has one update of several maps.
    """

    kind: str
    factors: Factors
    alpha: float | None
    rank: int | None
    rank_stabilized: bool = False
    magnitude: np.ndarray | None = None
    rows: Rows = WHOLE

    @property
    def scale(self) -> float:
        """s, the factor of D."""
        if self.alpha is None or self.rank is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def kind_of(factors: Factors) -> str:
    """The name of the kind that these factors make up. Raises ValueError for incomplete or foreign ones."""
    names = set(factors)
    for name, kind in KINDS.items():
        if any(complete <= names <= complete | kind.optional for complete in kind.complete):
            return name
    complete = next((kind.complete[0] for kind in KINDS.values() if names & kind.names), KINDS["LoRA"].complete[0])
    raise ValueError(
        f"needs both halves of an update, of one rank, such as {', '.join(sorted(complete))}; got "
        f"{', '.join(sorted(names)) or 'none'}"
    )


def rank_of(kind: str, factors: Factors) -> int | None:
    """The rank of an update, None if its factors are whole matrices. Raises ValueError for rank 0 and for vectors."""
    vector = next((name for name, factor in factors.items() if factor.ndim < 2), None)
    if vector:
        raise ValueError(f"has {vector} of shape {factors[vector].shape}; expected a matrix")
    ranks = [len(factors[name]) for name in KINDS[kind].ranked if name in factors]
    if 0 in ranks:
        raise ValueError("needs both halves of an update, of one rank above 0")
    return ranks[0] if ranks else None


def updated(weight: np.ndarray, update: Update, strength: float) -> np.ndarray:
    """W after the update: (out, in, …), float32.

    weight: W, (out, in, …), float32.
    strength: factor of s.
    Raises ValueError for an update of another shape.
    """
    factors = {name: np.asarray(factor, np.float32) for name, factor in update.factors.items()}
    try:
        change = KINDS[update.kind].change(**factors)
    except ValueError:
        shapes = ", ".join(f"{name} {factor.shape}" for name, factor in factors.items())
        raise ValueError(f"needs factors of one rank, got {shapes}") from None
    change = update.rows.of(change)
    shape = change.shape
    while len(shape) > 2 and shape[-1] == 1:  # a linear map may be stored as a 1x1 convolution, and vice versa
        shape = shape[:-1]
    if shape not in (weight.shape, (len(weight), math.prod(weight.shape[1:]))):
        raise ValueError(f"makes {change.shape}, the map has {weight.shape}")
    direction = weight + strength * update.scale * change.reshape(weight.shape)
    if update.magnitude is None:
        return direction
    whole = (len(weight) * update.rows.count // len(update.rows.parts), *weight.shape[1:])
    magnitude = np.asarray(_like(update.magnitude, whole), np.float32)
    if len(magnitude) > 1:
        magnitude = update.rows.of(magnitude)
    elif whole != weight.shape:
        raise ValueError("has a magnitude for each input of several maps together, which is not supported")
    axes = tuple(axis for axis, length in enumerate(magnitude.shape) if length == 1)
    norm = np.sqrt(np.sum(direction**2, axes, keepdims=True))
    return magnitude * direction / np.maximum(norm, np.finfo(np.float32).tiny)


def _like(magnitude, shape):
    """The magnitude with the axes of W: (out, 1, …) or (1, in, 1, …)."""
    outputs, inputs = ((shape[0],), (1, shape[1]))
    found = magnitude.shape
    while len(found) > 1 and found[-1] == 1:
        found = found[:-1]
    if found not in (outputs, inputs):
        raise ValueError(f"has a magnitude of shape {magnitude.shape}, the map has {shape}")
    return magnitude.reshape(*found, *(1,) * (len(shape) - len(found)))


def _flat(factor):
    return factor.reshape(len(factor), -1)


def _low_rank(lora_down, lora_up, lora_mid=None):
    if lora_mid is not None:
        return np.einsum("op,pqhw,qi->oihw", _flat(lora_up), lora_mid, _flat(lora_down))
    return (_flat(lora_up) @ _flat(lora_down)).reshape(len(lora_up), *lora_down.shape[1:])


def _matrix(a, b, core=None):
    """a (out, rank) b (rank, in), or of a convolution a (rank, out), core (rank, rank, h, w), b (rank, in)."""
    return a @ b if core is None else np.einsum("pqhw,po,qi->oihw", core, a, b)


def _hadamard(hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1=None, hada_t2=None):
    first, second = _matrix(hada_w1_a, hada_w1_b, hada_t1), _matrix(hada_w2_a, hada_w2_b, hada_t2)
    if first.shape != second.shape:
        raise ValueError("two matrices of one shape")
    return first * second


def _kronecker(
    lokr_w1=None, lokr_w1_a=None, lokr_w1_b=None, lokr_w2=None, lokr_w2_a=None, lokr_w2_b=None, lokr_t2=None
):
    first = _matrix(lokr_w1_a, lokr_w1_b) if lokr_w1 is None else lokr_w1
    second = _matrix(lokr_w2_a, lokr_w2_b, lokr_t2) if lokr_w2 is None else lokr_w2
    return np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)), second)


_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
KINDS = {
    "LoRA": Kind((frozenset({"lora_down", "lora_up"}),), frozenset({"lora_mid"}), ("lora_down",), _low_rank),
    "LoHa": Kind(
        (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
        frozenset({"hada_t1", "hada_t2"}),
        ("hada_w1_b",),
        _hadamard,
    ),
    "LoKr": Kind(
        tuple(frozenset(first | second) for first in _FIRST for second in _SECOND),
        frozenset(),
        ("lokr_w1_b", "lokr_w2_b"),
        _kronecker,
    ),
}
