"""One layer of a decoder: attention and MLP, each behind its norm.

Letters: B batch, T tokens, D hidden size.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from mla_jax import sharding
from mla_jax.cache import Dense
from mla_jax.layers.attention import MultiHeadLatentAttention
from mla_jax.layers.experts import MixtureOfExperts, Routing
from mla_jax.layers.mlp import GatedMLP
from mla_jax.layers.norm import RMSNorm
from mla_jax.layers.relay import Relay
from mla_jax.layers.step import Step
from mla_jax.models.config import DecoderConfig
from mla_jax.ops import dispatch


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: of the model.
        layer: which of its layers this is; the first ones may have a dense MLP.
        precision, implementation, types: as in `Decoder`.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, precision, implementation, **types):
        width = config.attention.hidden_size
        self.scale = config.residual_scale
        self.attention_norm = RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        self.attention = MultiHeadLatentAttention(
            config.attention_of(layer), precision=precision, implementation=implementation, **types
        )
        self.mlp_norm = RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        if config.is_sparse(layer):
            named = dispatch.normalized(implementation).get("routed_experts")
            self.mlp = MixtureOfExperts(config, precision=precision, implementation=named, **types)
        else:
            assert config.intermediate_size is not None  # the config fills it in
            self.mlp = GatedMLP(width, config.intermediate_size, precision=precision, **types)

    @property
    def mixers(self) -> tuple[MultiHeadLatentAttention, ...]:
        """What of this layer keeps something of every token, in the order of their stores."""
        return (self.attention,)

    def __call__(self, x: Float[Array, "B T D"], **options: Any) -> Float[Array, "B T D"]:
        """The layer without a cache; options as in the attention's `__call__`."""
        return self.attend(x, **options)[0]

    def attend(
        self, x: Float[Array, "B T D"], relay: Relay | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Relay | None]:
        """The layer without a cache between others: see `MultiHeadLatentAttention.attend`."""
        y, relay = self.attention.attend(self.attention_norm(x), relay, **options)
        return self._feed_forward(self._add(x, y)), relay

    def indexer_losses(self, x: Float[Array, "B T D"], **options: Any) -> list[Float[Array, ""]]:
        """The loss of the attention's indexer on the layer's input; none where it has none."""
        if not self.attention.config.has_indexer:
            return []
        return [self.attention.indexer_loss(self.attention_norm(x), **options)]

    def with_routing(
        self,
        x: Float[Array, "B T D"],
        relay: Relay | None = None,
        *,
        valid: Bool[Array, "B T"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Relay | None, Routing | None]:
        """`attend`, and what the router did; None where the MLP is dense.

        Args:
            x: activations.
            relay: of the layers before.
            valid: tokens that count for load and balance, where some are padding.
            options: as in the attention's `__call__`.
        """
        if not isinstance(self.mlp, MixtureOfExperts):
            return *self.attend(x, relay, **options), None
        y, relay = self.attention.attend(self.attention_norm(x), relay, **options)
        x = self._add(x, y)
        with jax.named_scope("mlp"):
            y, routing = self.mlp.with_routing(self.mlp_norm(x), valid)
            return self._add(x, y), relay, routing

    def extend(
        self,
        x: Float[Array, "B T D"],
        stores: tuple[Dense, ...],
        step: Step,
        relay: Relay | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Dense, ...], Relay | None]:
        """The layer on the new tokens of a step: see `MultiHeadLatentAttention.extend`.

        `stores` are those of its `mixers`.
        """
        (store,) = stores
        y, store, relay = self.attention.extend(self.attention_norm(x), store, step, relay)
        if x.shape[1] != 1:
            return self._feed_forward(self._add(x, y)), (store,), relay
        # Not (x + y) + z, which XLA makes of three kernels: the sum that the norm takes is then a
        # part of the norm's kernel, and where y comes in parts each reader sums them. A prompt
        # would keep an array more.
        with jax.named_scope("mlp"):
            z = self.mlp(self.mlp_norm(self._add(x, y)))
            return self._add(self._add(x, z), y), (store,), relay

    def _add(self, x, y):
        """The sum, y scaled as MiniCPM3 does."""
        y = sharding.beside(y, x)
        return x + (y if self.scale == 1 else y * self.scale)

    def _feed_forward(self, x):
        """The MLP with its norm and residual."""
        with jax.named_scope("mlp"):
            return self._add(x, self.mlp(self.mlp_norm(x)))
