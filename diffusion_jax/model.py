"""A diffusion model as one value: trained here or published, of latents or of pixels."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree, UInt8

from diffusion_jax import parallel
from diffusion_jax.codec import Codec, check_size
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.core.denoiser import Denoise, denoiser
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NOISE_ALONE, Schedule, below
from diffusion_jax.data.references import References
from diffusion_jax.models.adapters import WHOLE, Adapter
from diffusion_jax.models.applied import Applied


def _no_variables(key: Key[Array, ""]) -> PyTree:
    raise ValueError("this network has no initial variables: give Network an `init`")


def none_held_back(images: UInt8[np.ndarray, "batch height width 3"]) -> Bool[np.ndarray, "batch"]:
    """No image is held back: the default for a model without a safety checker."""
    return np.zeros(len(images), bool)


class Network(NamedTuple):
    """A network as training and sampling call it.

    apply: (params, x (B, h, w, c), t (B,), cond, keys=None) -> output (B, h, w, c). Keys (B,) turn dropout on.
    init: key -> initial params.
    known_channels: channels of cond["known"], the known part of the image, for an inpainting network; see `inpaint`.
    flow_map: whether it takes the end of a step as cond["to"]; see `core.denoiser`.
    takes_scale: whether it takes the guidance scale as cond["guidance"], because guidance is built in.
    takes_interval: whether it takes the levels with guidance as cond["interval"], in the unit of cond["to"].
    step: height and width of x should be multiples of it, so that the network can halve them as often as it does.
    cell: height and width of x must be multiples of it: the side of a transformer's patches.
    """

    apply: Callable[..., Array]
    init: Callable[[Key[Array, ""]], PyTree] = _no_variables
    known_channels: int = 0
    flow_map: bool = False
    takes_scale: bool = False
    takes_interval: bool = False
    step: int = 1
    cell: int = 1


def network_of(module: Any, init: Callable[[Key[Array, ""]], PyTree] | None = None) -> Network:
    """A network of `models` as training and sampling call it.

    module: a `UNet`, a `Transformer` or another one with the same properties: step, cell, reads and so on.
    init: key -> its variables, by default random ones.
    """
    return Network(
        apply=Applied(module),
        init=init or jax.jit(lambda key: module.init(key, *module.example_inputs())),
        known_channels=module.known_channels,
        flow_map=module.target_embedding,
        takes_scale=module.reads["guidance"],
        takes_interval=module.reads.get("interval", False),
        step=module.step,
        cell=module.cell,
    )


class DiffusionModel(NamedTuple):
    """Everything about a model that training, sampling, evaluation and export need.

    network: predicts from a noisy x, its time and a condition.
    params: its variables. Before training or loading, their shapes (`jax.ShapeDtypeStruct`).
    schedule: time -> noise level.
    parameterization: the network's input and the meaning of its output.
    codec: images <-> x0.
    conditioning: prompts and records -> cond, with "no condition".
    size: height and width of an image, pixels.
    adapter: says which of the variables are trained.
    published_solvers: name -> (steps, strength, size) -> Plan, the solvers published with the model.
    published_times: name -> (steps, size) -> times, the spacings published with the model, for any solver.
    has_guidance: whether guidance of one scale is built in, so that the model must not be guided again.
    held_back: images -> whether the model's safety checker holds each of them back.
    references: which reference pictures it reads beside the prompt; see `pipelines.with_references`.
    """

    network: Network
    params: PyTree
    schedule: Schedule
    parameterization: Parameterization
    codec: Codec
    conditioning: Conditioning
    size: tuple[int, int]
    adapter: Adapter = WHOLE
    published_solvers: Mapping[str, Callable] = MappingProxyType({})
    published_times: Mapping[str, Callable] = MappingProxyType({})
    has_guidance: bool = False
    held_back: Callable[[UInt8[np.ndarray, "batch height width 3"]], Bool[np.ndarray, "batch"]] = none_held_back
    references: References = References()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the x0 of one image."""
        height, width = self.size
        return height // self.codec.factor, width // self.codec.factor, self.codec.channels

    @property
    def is_cached(self) -> bool:
        """Whether training computes outputs of its frozen networks once, into a cache."""
        return self.codec.cache_key is not None or self.conditioning.cache_key is not None

    @property
    def useful_schedule(self) -> Schedule:
        """The schedule for plans, without levels that magnify the network's errors too much."""
        noisiest = self.schedule(np.float64(self.schedule.t_max))
        with np.errstate(divide="ignore"):
            worst = self.parameterization.magnification(noisiest)
        return self.schedule if worst <= NOISE_ALONE else below(self.schedule)

    def denoiser(self, params: PyTree) -> Denoise:
        """The network with these variables as a denoiser."""
        return denoiser(self.network.apply, params, self.parameterization, self.network.flow_map)

    @property
    def cell(self) -> int:
        """Height and width of an image are multiples of it, pixels."""
        return self.codec.factor * self.network.cell

    def resized(self, size: tuple[int, int]) -> "DiffusionModel":
        """The model for images of another height and width, pixels. Raises ValueError for a size it cannot make."""
        check_size(size, self.cell)
        return self._replace(size=size, conditioning=self.conditioning.for_size(self.conditioning, size))

    def turns(self, devices: int = 1, padded: bool = False) -> dict[str, int]:
        """Bytes of weights that each of a host's devices holds, of the networks in the order in which sampling uses
        them.

        devices: how many divide text encoders and denoiser, see `parallel.local`.
        padded: as in `parallel.bytes_held`.
        """
        turns = {"text encoders": self.conditioning.weights, "denoiser": self.params, "autoencoder": self.codec.params}
        names = {name: "pmap" if name == "autoencoder" else f"fsdp={devices}" for name in turns}
        return {name: parallel.bytes_held(part, names[name], devices, padded) for name, part in turns.items()}

    def placed(self) -> "DiffusionModel":
        """The model with its weights on this host's devices, so that they are copied once for many batches."""
        params, decoder = parallel.whole((self.params, self.codec.params))
        return self._replace(params=params, codec=self.codec._replace(params=decoder))
