"""One layer of a decoder: attention and MLP, each behind its norm.

Letters: B batch, T tokens, D hidden size.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mla_jax.cache import LatentCache
from mla_jax.layers.attention import MultiHeadLatentAttention
from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.layers.mlp import GatedMLP
from mla_jax.models.config import DecoderConfig


class Block(nnx.Module):
    """One layer: attention and MLP, each behind its norm."""

    def __init__(self, config: DecoderConfig, layer: int, *, precision, implementation, **types):
        width = config.attention.hidden_size
        self.scale = config.residual_scale
        self.attention_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        self.attention = MultiHeadLatentAttention(
            config.attention, precision=precision, implementation=implementation, **types
        )
        self.mlp_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        if config.is_sparse(layer):
            self.mlp = MixtureOfExperts(config, precision=precision, **types)
        else:
            self.mlp = GatedMLP(width, config.intermediate_size, precision=precision, **types)

    def add(self, x, y):
        """The sum, y scaled as MiniCPM3 does."""
        return x + (y if self.scale == 1 else y * self.scale)

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP with its norm and residual."""
        with jax.named_scope("mlp"):
            return self.add(x, self.mlp(self.mlp_norm(x)))

    def extend(self, x, cache: LatentCache, lengths=None, schedule=None, empty=False):
        """The layer on T new tokens of every row: `prefill` with lengths, `decode` without."""
        hidden = self.attention_norm(x)
        if lengths is None:
            y, cache = self.attention.decode(hidden, cache, schedule=schedule)
        else:
            y, cache = self.attention.prefill(hidden, cache, lengths, empty=empty)
        return self.feed_forward(self.add(x, y)), cache
