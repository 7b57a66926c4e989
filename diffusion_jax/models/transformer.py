"""Transformers over the patches of an image: DiT (Peebles & Xie 2022) and its relatives."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from diffusion_jax.models.attention import ACTIVATIONS
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers import Dense, zeros_init
from diffusion_jax.models.token_layers import (
    NORMS,
    PAIRS,
    ConditionEmbedding,
    Modulation,
    PatchEmbed,
    Rotation,
    grid_positions,
    image_of,
    joint_mask,
    modulated,
    rotation,
    token_norm,
)
from diffusion_jax.models.transformer_block import FINAL_EPS, Inputs, TransformerBlock

CHOICES = {  # of the fields that are names
    "activation_fn": tuple(ACTIVATIONS),
    "modulation": ("own", "block", "shared"),
    "norm": NORMS,
    "qk_norm": (None, *NORMS),
    "positions": (None, "sincos", "learned"),
    "rope_pairs": PAIRS,
    "text": (None, "cross", "joint"),
}
VECTORS = ("label", "to", "guidance", "interval")  # the leaves of a condition that become one vector


class Transformer(nn.Module):
    """A transformer over patches: (noisy image, time, condition) -> prediction of the same height and width.

    Fields that config.json of diffusers' `DiTTransformer2DModel` has are those, with the same meaning.

    sample_size: height and width of x in training, or one number for both: the grid of its positions, over which those
      of other sizes are stretched. None takes the grid of each image.
    patch_size: pixels of x on a side of a patch.
    out_channels: None for in_channels. A network that also predicts a variance has twice as many, the mean first.
    num_layers, num_attention_heads, attention_head_dim: depth; the width is heads times channels of a head. Heads of
      128 are those of the fused kernels of TPU and GPU.
    attention_bias: whether the maps to q, k and v have one.
    activation_fn: gelu-approximate, gelu, geglu or swiglu.
    num_embeds_ada_norm: number of classes, None for a network without. The last class, num_embeds_ada_norm, is none.
    norm_elementwise_affine: whether the norms have learned scales.
    norm_eps: of norms, but for those before attention and at the end, which have 1e-6.

    Not in that config:
    mlp_ratio: width of the MLP, in widths of the network.
    modulation: where the vectors of adaLN-zero come from. "block": every block maps one embedding of the condition.
      "shared": all blocks have the same vectors (FLUX.2). "own": every block also has an embedding of its own,
      which is how diffusers stores DiT.
    norm: layer_norm or rms_norm.
    qk_norm: norm of each head of q and k, None for none.
    positions: sincos or learned, added to the tokens at the start, or None.
    axes_dims_rope: channels of a head that each axis rotates, none for no rotation. One axis counts the tokens, two are
      row and column; of three, the first counts the tokens of a joint text from 1, and is 0 for the image.
    rope_theta, rope_pairs: see `token_layers.rotation` and `rotate`.
    text: "cross", every block attends to the text; "joint", the text is tokens before those of the image. None for a
      network without.
    cross_attention_dim: width of the text, either way.
    freq_shift: of the waves of the time, see `sinusoidal_embedding`.
    time_cond_proj_dim, target_embedding, time_smoothing: as of `models.unet.UNet`.
    interval_embedding: whether the network takes the interval of its built-in guidance as input.
    dtype: of the large multiplications. Parameters, norms, softmax, modulation and output are float32.
    remat: recompute blocks in the backward pass instead of storing their activations.
    scan: compile one block for all. Their variables are then stacked (`models.stacking`).
    attention_implementation: see `attention`.
    """

    CONDITION_FIELDS = {  # noqa: RUF012  (no field) leaf of the condition -> the field that reads it, and its value
        "label": ("num_embeds_ada_norm", "the number of classes"),
        "text": ("text", "'cross' or 'joint'"),
    }
    sample_size: int | tuple[int, int] | None = None
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    attention_bias: bool = True
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int | None = None
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0

    mlp_ratio: float = 4.0
    modulation: str = "block"
    norm: str = "layer_norm"
    qk_norm: str | None = None
    positions: str | None = "sincos"
    axes_dims_rope: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    rope_pairs: str = "adjacent"
    text: str | None = None
    cross_attention_dim: int | None = None
    freq_shift: float | int = 0
    time_cond_proj_dim: int | None = None
    target_embedding: bool = False
    interval_embedding: bool = False
    time_smoothing: float = 50.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan: bool = False
    attention_implementation: str = "auto"

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def known_channels(self) -> int:
        """0: there is no input for the known part of an image."""
        return 0

    @property
    def step(self) -> int:
        """Height and width of x are best multiples of it."""
        return self.patch_size

    @property
    def cell(self) -> int:
        """Height and width of x must be multiples of it."""
        return self.patch_size

    @property
    def reads(self) -> dict[str, bool]:
        """Each leaf of a condition -> whether this network reads it."""
        return {
            "text": self.text is not None,
            "label": self.num_embeds_ada_norm is not None,
            "to": self.target_embedding,
            "guidance": self.time_cond_proj_dim is not None,
            "interval": self.interval_embedding,
        }

    def setup(self):
        self._check_fields()
        own = self.modulation == "own"
        embed = functools.partial(
            ConditionEmbedding,
            self.width,
            self.num_embeds_ada_norm,
            self.freq_shift,
            self.time_smoothing,
            self.target_embedding,
            self.time_cond_proj_dim,
            self.interval_embedding,
        )
        if not own:
            self.emb = embed()
        if self.modulation == "shared":
            self.adaln = Modulation(6)
        self.pos_embed = PatchEmbed(self.width, self.patch_size, self.positions, self._base_grid(), self.dtype)
        if self.text == "joint":
            self.context_embedder = Dense(self.width, self.dtype)
        block = self._block(embed if own else None)
        if self.scan:
            self.transformer_blocks_each = block()
        else:
            self.transformer_blocks = [block() for _ in range(self.num_layers)]
        self.norm_out = token_norm(self.norm, FINAL_EPS, self.norm_elementwise_affine)()
        self.proj_out_1 = Dense(2 * self.width, init=zeros_init)
        self.proj_out_2 = Dense(self.patch_size**2 * (self.out_channels or self.in_channels), init=zeros_init)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "#batch"] | Num[Array, ""],
        cond: Mapping[str, Array] = MappingProxyType({}),
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """Predict from the noisy image x at time t.

        t: () or (B,), in the network's own unit.
        cond: the condition, each entry with a batch axis in front.
          text (L, D) float, mask (L,) bool: the text; False marks padding. The mask is optional.
          label () int: the class.
          to () float: the time of the target, of target_embedding.
          guidance () float: the guidance scale, of time_cond_proj_dim.
          interval (2,) float: the times, in the unit of `to`, between which there is guidance, of interval_embedding.
        keys: (B,), one for each image. They turn dropout on. The result of an image does not depend on its batch.
        Raises ValueError for fields that contradict each other, for a missing or unknown condition, and for an image
        that cannot be cut into patches.
        """
        self._check(x, cond)
        grid = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        tokens, texts = self.pos_embed(x), 0
        if self.text == "joint":
            text = self.context_embedder(cond["text"])
            tokens, texts = jnp.concatenate([text, tokens], axis=1), text.shape[1]
        condition = jnp.broadcast_to(t, x.shape[:1]), {name: cond[name] for name in VECTORS if name in cond}
        c = None if self.modulation == "own" else self.emb(*condition)
        inputs = Inputs(
            condition={"own": condition, "block": c, "shared": c}[self.modulation],
            turn=self._turn(grid, texts),
            mask=joint_mask(cond["mask"], tokens.shape[1]) if self.text == "joint" and "mask" in cond else None,
            text=cond["text"] if self.text == "cross" else None,
            text_mask=cond.get("mask") if self.text == "cross" else None,
            keys=keys,
        )
        if self.modulation == "shared":
            inputs = inputs._replace(condition=self.adaln(c))
        tokens, embeddings = self._run_blocks(tokens, inputs)
        shift, scale = jnp.split(self.proj_out_1(nn.silu(embeddings if c is None else c))[:, None], 2, axis=-1)
        out = self.proj_out_2(modulated(self.norm_out(tokens[:, texts:]), shift, scale))
        return image_of(out, grid, self.patch_size)

    def _run_blocks(self, tokens: Array, inputs: Inputs) -> tuple[Array, Array | None]:
        """The tokens after all blocks, and for modulation="own" the embedding of the condition in the first block."""
        if self.scan:
            one_after_the_other = nn.scan(
                lambda block, x, layer: block(x, layer, inputs),
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=self.num_layers,
            )
            tokens, embeddings = one_after_the_other(self.transformer_blocks_each, tokens, jnp.arange(self.num_layers))
            return tokens, jax.tree.map(lambda leaf: leaf[0], embeddings)
        embeddings = []
        for layer, block in enumerate(self.transformer_blocks):
            tokens, c = block(tokens, layer, inputs)
            embeddings.append(c)
        return tokens, embeddings[0]

    def _block(self, embedding: Callable[..., nn.Module] | None) -> Callable[[], TransformerBlock]:
        return functools.partial(
            nn.remat(TransformerBlock, prevent_cse=not self.scan) if self.remat else TransformerBlock,
            heads=self.num_attention_heads,
            modulation=self.modulation,
            embedding=embedding,
            norm=self.norm,
            affine=self.norm_elementwise_affine,
            eps=self.norm_eps,
            qk_norm=self.qk_norm,
            pairs=self.rope_pairs,
            bias=self.attention_bias,
            activation=self.activation_fn,
            ratio=self.mlp_ratio,
            dropout=self.dropout,
            dtype=self.dtype,
            implementation=self.attention_implementation,
        )

    def example_inputs(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest valid (x, t, cond), all zeros, for `init` and for shape inference."""
        cond = {}
        if self.text is not None:
            cond["text"] = jnp.zeros((1, 1, self.cross_attention_dim))
        if self.num_embeds_ada_norm is not None:
            cond["label"] = jnp.zeros((1,), jnp.int32)
        if self.target_embedding:
            cond["to"] = jnp.zeros((1,))
        if self.time_cond_proj_dim is not None:
            cond["guidance"] = jnp.ones((1,))
        if self.interval_embedding:
            cond["interval"] = jnp.zeros((1, 2))
        return jnp.zeros((1, self.patch_size, self.patch_size, self.in_channels)), jnp.zeros((1,)), cond

    def _base_grid(self) -> tuple[int, int] | None:
        """Patches in a column and in a row of an image in training."""
        if self.sample_size is None:
            return None
        height, width = np.broadcast_to(self.sample_size, 2).tolist()
        return height // self.patch_size, width // self.patch_size

    def _turn(self, grid: tuple[int, int], texts: int) -> Rotation | None:
        """The rotary positions of the tokens: those of a text, and those of a grid of patches."""
        axes = len(self.axes_dims_rope)
        if not axes:
            return None
        positions = np.zeros((texts + grid[0] * grid[1], axes))
        if axes == 1:
            positions[:, 0] = np.arange(len(positions))
        else:
            positions[texts:, -2:] = grid_positions(grid)
        if axes == 3:
            positions[:texts, 0] = 1 + np.arange(texts)
        return rotation(positions, self.axes_dims_rope, self.rope_theta)

    def _check_fields(self) -> None:
        for field, names in CHOICES.items():
            if getattr(self, field) not in names:
                raise ValueError(f"Transformer: {field} must be one of {names}, got {getattr(self, field)!r}")
        if len(self.axes_dims_rope) > 3 or (
            self.axes_dims_rope and sum(self.axes_dims_rope) != self.attention_head_dim
        ):
            raise ValueError(
                f"Transformer: axes_dims_rope must have up to three widths that add up to attention_head_dim = "
                f"{self.attention_head_dim}, got {self.axes_dims_rope}"
            )
        if self.positions == "learned" and self.sample_size is None:
            raise ValueError("Transformer: positions='learned' needs sample_size, the size of its table")
        if self.text is not None and self.cross_attention_dim is None:
            raise ValueError(f"Transformer: text={self.text!r} needs cross_attention_dim, the width of the text")
        if self.interval_embedding and self.time_cond_proj_dim is None:
            raise ValueError("Transformer: interval_embedding needs time_cond_proj_dim, for the guidance scale")
        if self.num_layers < 1:
            raise ValueError(f"Transformer: num_layers must be at least 1, got {self.num_layers}")

    def _check(self, x: Array, cond: Mapping[str, Array]) -> None:
        check_condition("Transformer", self.reads, cond)
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"Transformer: expected {self.in_channels} input channels (last axis), got {x.shape[-1]}")
        if any(side % self.patch_size for side in x.shape[1:3]):
            raise ValueError(
                f"Transformer: expected height and width that are multiples of patch_size = {self.patch_size}, got "
                f"{x.shape[1]} and {x.shape[2]}"
            )
        if self.text is not None and cond["text"].shape[-1] != self.cross_attention_dim:
            raise ValueError(
                f"Transformer: expected a text of width {self.cross_attention_dim}, got shape {cond['text'].shape}"
            )
