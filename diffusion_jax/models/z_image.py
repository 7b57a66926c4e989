"""The transformer of Z-Image (Tongyi-MAI 2025, arXiv 2511.22699): one stream of tokens for image and text.

Field names follow config.json and layer names the state dict of diffusers' `ZImageTransformer2DModel`.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Num

from diffusion_jax.models.attention import Attention
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers import Dense, sinusoidal_embedding, zeros_init
from diffusion_jax.models.stacking import EACH, through
from diffusion_jax.models.token_layers import (
    WAVES,
    GatedFeedForward,
    Rotation,
    embedding_init,
    grid_positions,
    image_of,
    patches,
    rotation,
    token_norm,
)

GROUP = 32  # tokens of an image and of a text are filled up to a multiple of it
TIME_WIDTH, TIME_HIDDEN = 256, 1024  # of the embedding of the time: at most, and between its maps
QK_EPS, FINAL_EPS = 1e-5, 1e-6


class TimeEmbedding(nn.Module):
    """Two linear maps with a SiLU between of the waves of a time."""

    width: int

    @nn.compact
    def __call__(self, t: Num[Array, "batch"]) -> Float[Array, "batch {self.width}"]:
        return Dense(self.width, name="mlp_2")(
            nn.silu(Dense(TIME_HIDDEN, name="mlp_0")(sinusoidal_embedding(t, WAVES)))
        )


class Block(nn.Module):
    """Attention, then feed-forward, each with a norm before and after it, and with its residual.

        x += tanh(gate1) · norm2(attention(norm1(x) (1 + scale1)))
        x += tanh(gate2) · norm2(feed_forward(norm1(x) (1 + scale2)))

    modulated: whether it has scales and gates; they are 0 and infinite without. Other fields as of `ZImageTransformer`.
    """

    modulated: bool
    n_heads: int
    norm_eps: float
    qk_norm: bool
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        c: Float[Array, "batch _"],
        turn: Rotation,
        mask: Bool[Array, "batch length"] | None,
    ) -> Float[Array, "batch length width"]:
        scale1, gate1, scale2, gate2 = self._vectors(c, x.shape[-1])
        norm = token_norm("rms_norm", self.norm_eps, affine=True)
        qk_norm = token_norm("rms_norm", QK_EPS, affine=True) if self.qk_norm else None
        attend = Attention(
            self.n_heads, self.dtype, self.implementation, qk_norm=qk_norm, out_bias=False, name="attention"
        )
        h = attend(norm(name="attention_norm1")(x) * scale1, None, mask, turn)
        x = x + (gate1 * norm(name="attention_norm2")(h)).astype(x.dtype)
        feed_forward = GatedFeedForward(int(x.shape[-1] / 3 * 8), ("w1", "w3", "w2"), self.dtype, name="feed_forward")
        h = feed_forward(norm(name="ffn_norm1")(x) * scale2)
        return x + (gate2 * norm(name="ffn_norm2")(h)).astype(x.dtype)

    def _vectors(self, c, width):
        if not self.modulated:
            return 1.0, 1.0, 1.0, 1.0
        scale1, gate1, scale2, gate2 = jnp.split(Dense(4 * width, name="adaLN_modulation_0")(c)[:, None], 4, axis=-1)
        return 1 + scale1, jnp.tanh(gate1), 1 + scale2, jnp.tanh(gate2)


class FinalLayer(nn.Module):
    """A linear map of the normalized tokens, scaled by the time."""

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], c: Float[Array, "batch _"]
    ) -> Float[Array, "batch length {self.features}"]:
        scale = Dense(x.shape[-1], init=zeros_init, name="adaLN_modulation_1")(nn.silu(c))[:, None]
        h = token_norm("layer_norm", FINAL_EPS, affine=False)(name="norm_final")(x) * (1 + scale)
        return Dense(self.features, init=zeros_init, name="linear")(h)


class ByPatch(nn.Module):
    """A layer that a checkpoint has for each size of patches, here for one. layer: function from name to it."""

    size: int
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        return self.layer(name=f"{self.size}-1")(*inputs)


class ZImageTransformer(nn.Module):
    """A transformer over latents: (noisy latents, time, text) -> prediction. Defaults are those of Z-Image.

    The sequence is the image, then the text. Both are filled up to a multiple of 32 tokens by a learned token each,
    which is attended to. Two refiners run first, one on the image and one, without the time, on the text.

    all_patch_size, all_f_patch_size: latents on a side of a patch, and frames: one size, and (1,).
    dim, n_heads: width of tokens, and number of heads.
    n_layers, n_refiner_layers: blocks of the sequence, and of each refiner.
    qk_norm: whether each head of q and k is normalized.
    cap_feat_dim: width of the text.
    t_scale: the time of a clean image, as the network sees it: its times go from noise to image.
    axes_dims, axes_lens: channels of a head that each coordinate rotates (word, row, column), and their largest values.

    Not in config.json:
    sample_size: height and width of the latents of a usual image.
    dtype: of the large multiplications. Parameters, norms, softmax, modulation and output are float32.
    remat, scan, attention_implementation: as of `models.transformer.Transformer`.
    """

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    sample_size: int = 128
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan: bool = False
    attention_implementation: str = "auto"

    known_channels = 0  # there is no input for the known part of an image
    target_embedding = False

    @property
    def step(self) -> int:
        """Height and width of x are best multiples of it."""
        return self.cell

    @property
    def cell(self) -> int:
        """Height and width of x must be multiples of it."""
        return self.all_patch_size[0]

    @property
    def reads(self) -> dict[str, bool]:
        """Each leaf of a condition -> whether this network reads it."""
        return {"text": True, "guidance": False}

    def setup(self):
        self._check_fields()
        size, width = self.cell, min(self.dim, TIME_WIDTH)
        self.t_embedder = TimeEmbedding(width)
        self.all_x_embedder = ByPatch(size, functools.partial(Dense, self.dim, self.dtype))
        self.cap_embedder_0 = token_norm("rms_norm", self.norm_eps, affine=True)()
        self.cap_embedder_1 = Dense(self.dim, self.dtype)
        self.x_pad_token = self.param("x_pad_token", embedding_init, (1, self.dim))
        self.cap_pad_token = self.param("cap_pad_token", embedding_init, (1, self.dim))
        plain, modulated = self._block(modulated=False), self._block(modulated=True)
        if self.scan:
            self.noise_refiner_each, self.context_refiner_each, self.layers_each = modulated(), plain(), modulated()
        else:
            self.noise_refiner = [modulated() for _ in range(self.n_refiner_layers)]
            self.context_refiner = [plain() for _ in range(self.n_refiner_layers)]
            self.layers = [modulated() for _ in range(self.n_layers)]
        self.all_final_layer = ByPatch(size, functools.partial(FinalLayer, size**2 * self.in_channels))

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "#batch"] | Num[Array, ""],
        cond: Mapping[str, Array] = MappingProxyType({}),
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """Predict eps - x0 from the noisy latents x at time t.

        t: () or (B,), 1000 sigma.
        cond: the condition, each entry with a batch axis in front.
          text (L, D) float, mask (L,) bool: the text; False marks padding, which follows the text. Without a mask all
            tokens are text.
        keys: not used.
        Raises ValueError for fields that contradict each other, for a missing or unknown condition, and for more
        tokens or a larger image than axes_lens allow.
        """
        size = self.cell
        self._check(x, cond)
        grid = x.shape[1] // size, x.shape[2] // size
        c = self.t_embedder(self.t_scale / 1000 * (1000 - jnp.broadcast_to(t, x.shape[:1])))
        words = self.cap_embedder_1(self.cap_embedder_0(cond["text"]))
        words, filled, mask = self._filled_text(words, cond.get("mask"))
        image = _filled(self.all_x_embedder(patches(x, size)), self.x_pad_token)
        of_image, of_text = self._turns(grid, filled, words.shape[1], image.shape[1])

        image = self._through("noise_refiner", self.n_refiner_layers, image, c, of_image, None)
        words = self._through("context_refiner", self.n_refiner_layers, words, c, of_text, mask)
        tokens = jnp.concatenate([image, words], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0), (image.shape[1], 0)], constant_values=True)
        turn = Rotation(*(_joined(*tables) for tables in zip(of_image, of_text, strict=True)))
        tokens = self._through("layers", self.n_layers, tokens, c, turn, mask)
        out = self.all_final_layer(tokens, c)
        return -image_of(out[:, : grid[0] * grid[1]], grid, size)

    def example_inputs(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest valid (x, t, cond), all zeros, for `init` and for shape inference."""
        side = self.cell
        return (
            jnp.zeros((1, side, side, self.in_channels)),
            jnp.zeros((1,)),
            {"text": jnp.zeros((1, 1, self.cap_feat_dim))},
        )

    def _through(self, name: str, count: int, tokens: Array, *inputs) -> Array:
        return through(getattr(self, name + EACH * self.scan), count, tokens, *inputs)

    def _block(self, modulated: bool) -> Callable[[], Block]:
        return functools.partial(
            nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block,
            modulated,
            self.n_heads,
            self.norm_eps,
            self.qk_norm,
            self.dtype,
            self.attention_implementation,
        )

    def _filled_text(
        self, words: Float[Array, "batch words width"], mask: Bool[Array, "batch words"] | None
    ) -> tuple[Float[Array, "batch length width"], Array | int, Bool[Array, "batch length"] | None]:
        """The text filled up with its pad token; tokens of the filled text, (B,) with a mask; which these are."""
        words = _filled(words, self.cap_pad_token)
        if mask is None:
            return words, words.shape[1], None
        count, places = mask.sum(axis=1), jnp.arange(words.shape[1])
        filled = _up(count)
        words = jnp.where((places < count[:, None])[..., None], words, self.cap_pad_token.astype(words.dtype))
        return words, filled, places < filled[:, None]

    def _turns(self, grid: tuple[int, int], filled: Array | int, words: int, tokens: int) -> tuple[Rotation, Rotation]:
        """The rotary positions of image and text: words are counted from 1, and the image comes after the last one.

        filled: tokens of the filled text, (B,) or one for all. words, tokens: of the longest text, and of an image.
        """
        of_words = np.zeros((words, 3))
        of_words[:, 0] = 1 + np.arange(words)
        pixels = grid[0] * grid[1]
        places = np.zeros((tokens, 3))
        places[:pixels, 1:] = grid_positions(grid)
        first = np.arange(tokens)[:, None] < np.array([[pixels, 0, 0]])  # where the first coordinate is the text's end
        xp = jnp if isinstance(filled, jax.Array) else np
        places = xp.where(first, 1.0 + xp.asarray(filled)[..., None, None], places)
        turn = functools.partial(rotation, widths=self.axes_dims, theta=self.rope_theta)
        return turn(places), turn(of_words)

    def _check_fields(self) -> None:
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3 or self.n_heads * sum(self.axes_dims) != self.dim:
            raise ValueError(
                f"ZImageTransformer: expected three axes_dims that add up to dim / n_heads = "
                f"{self.dim / self.n_heads:g} and three axes_lens, got {self.axes_dims} and {self.axes_lens}"
            )
        if len(self.all_patch_size) != 1 or self.all_f_patch_size != (1,):
            raise ValueError(
                f"ZImageTransformer: expected one size of patches, of one frame, got all_patch_size "
                f"{self.all_patch_size} and all_f_patch_size {self.all_f_patch_size}"
            )
        if min(self.n_layers, self.n_refiner_layers) < 1:
            raise ValueError(
                f"ZImageTransformer: expected at least one block of each kind, got n_layers {self.n_layers} and "
                f"n_refiner_layers {self.n_refiner_layers}"
            )

    def _check(self, x: Array, cond: Mapping[str, Array]) -> None:
        check_condition("ZImageTransformer", self.reads, cond)
        sides, text = x.shape[1:3], cond["text"]
        if (x.shape[-1], text.shape[-1]) != (self.in_channels, self.cap_feat_dim):
            raise ValueError(
                f"ZImageTransformer: expected {self.in_channels} input channels and a text of width "
                f"{self.cap_feat_dim}, got {x.shape[-1]} and {text.shape[-1]}"
            )
        if any(side % self.cell for side in sides):
            raise ValueError(
                f"ZImageTransformer: expected height and width that are multiples of {self.cell}, the size of a patch, "
                f"got {sides[0]} and {sides[1]}"
            )
        largest = self.axes_lens[0] - 2, *(self.cell * most for most in self.axes_lens[1:])
        if any(found > most for found, most in zip((_up(text.shape[1]), *sides), largest, strict=True)):
            raise ValueError(
                f"ZImageTransformer: axes_lens allow {largest[0]} tokens of text, a multiple of {GROUP}, and latents "
                f"of {largest[1]} x {largest[2]}, got {_up(text.shape[1])} and {sides[0]} x {sides[1]}"
            )


def _up(count: Array | int) -> Array | int:
    """count, rounded up to a multiple of GROUP."""
    return -(-count // GROUP) * GROUP


def _filled(
    tokens: Float[Array, "batch length width"], by: Float[Array, "1 width"]
) -> Float[Array, "batch filled width"]:
    """The tokens, filled up to a multiple of GROUP by one token."""
    missing = _up(tokens.shape[1]) - tokens.shape[1]
    filling = jnp.broadcast_to(by.astype(tokens.dtype), (len(tokens), missing, tokens.shape[-1]))
    return jnp.concatenate([tokens, filling], axis=1)


def _joined(first: Float[Array, "*b n half"], second: Float[Array, "m half"]) -> Float[Array, "*b length half"]:
    """Tables of two sequences, the first one of each image or of all."""
    second = jnp.broadcast_to(second, (*first.shape[:-2], *second.shape[-2:]))
    return jnp.concatenate([first, second], axis=-2)
