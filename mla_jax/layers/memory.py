"""What a layer attends to without being part of it: a sequence of latents, made once.

In cross-attention queries come from one sequence and latents from another, such as an encoder's
states. The latents do not change while the queries' text grows, so a decoder makes them once and
attends to them at every step, in the absorbed form for a few queries: M (R + P) numbers a row, for
all heads.

Letters: B batch, M tokens of the memory, T query tokens, R latent, P rotary.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from mla_jax.config import MLAConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """Latents and rotary keys of a sequence: see `MultiHeadLatentAttention.remember`.

    Attributes:
        latent: [B M R].
        k_rope: rotated, [B M P].
        lengths: int32 [B], tokens of each row; None is M for all.

    >>> import jax.numpy as jnp
    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> memory = layer.remember(jnp.ones((2, 7, 128)), jnp.array([7, 4]))
    >>> memory.latent.shape
    (2, 7, 64)
    >>> layer(jnp.ones((2, 1, 128)), memory=memory).shape
    (2, 1, 128)
    """

    latent: Float[Array, "B M R"]
    k_rope: Float[Array, "B M P"]
    lengths: Int[Array, "B"] | None = None

    def check(self, config: MLAConfig, batch: int, segment_ids: Any = None) -> None:
        """Raises ValueError unless a layer of this config can attend to it from `batch` rows."""
        wants = [key for key in ("sliding_window", "index_topk", "kv_source_layer",
                                 "kv_store_layer") if getattr(config, key) is not None]  # fmt: skip
        if wants or segment_ids is not None:
            raise ValueError(
                f"memory goes with no {', '.join(wants or ['segment_ids'])}; what a token may see "
                "of it is said by mask [B N T M]."
            )
        shapes = self.latent.shape, self.k_rope.shape
        tokens = self.latent.shape[1] if self.latent.ndim == 3 else 0
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        if shapes != tuple((batch, tokens, width) for width in widths):
            raise ValueError(
                f"memory has latents {shapes[0]} and rotary keys {shapes[1]}: for this input and "
                f"layer they must be ({batch}, M, {widths[0]}) and ({batch}, M, {widths[1]})."
            )
