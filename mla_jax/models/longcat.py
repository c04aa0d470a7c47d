"""A layer of LongCat-Flash: two attentions, two MLPs, and experts on a shortcut around the second.

ScMoE (LongCat-Flash, arXiv 2509.01322, section 2.1): what the experts make of the state after the
first attention is added at the layer's end, so that a device can compute it beside all between.

    x -+- attention 0 -+-+--------- MLP 0 ----+-- attention 1 -+- MLP 1 -+- + -> y
                         +- experts ------------------------------------------+

Letters: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable
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


class ShortcutBlock(nnx.Module):
    """Attention, MLP, attention, MLP, each behind its norm; the experts read what MLP 0 reads.

    Args:
        config: of the model; every layer has experts.
        layer: which of its layers this is.
        precision, implementation, types: as in `Decoder`.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, precision, implementation, **types):
        width, inner = config.attention.hidden_size, config.intermediate_size
        assert inner is not None  # the config fills it in
        attention = config.attention_of(layer)
        cores = {"precision": precision, "implementation": implementation, **types}
        norm = lambda: RMSNorm(width, epsilon=config.rms_norm_eps, **types)  # noqa: E731
        self.attention_norms = nnx.List(norm() for _ in range(2))
        self.attentions = nnx.List(MultiHeadLatentAttention(attention, **cores) for _ in range(2))
        self.mlp_norms = nnx.List(norm() for _ in range(2))
        self.mlps = nnx.List(GatedMLP(width, inner, precision=precision, **types) for _ in range(2))
        named = dispatch.normalized(implementation).get("routed_experts")
        self.mlp = MixtureOfExperts(config, precision=precision, implementation=named, **types)

    @property
    def mixers(self) -> tuple[MultiHeadLatentAttention, ...]:
        """Both attentions, in the order of their stores."""
        return tuple(self.attentions)

    def __call__(self, x: Float[Array, "B T D"], **options: Any) -> Float[Array, "B T D"]:
        """The layer without a cache; options as in the attention's `__call__`."""
        return self.attend(x, **options)[0]

    def attend(
        self, x: Float[Array, "B T D"], relay: Relay | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Relay | None]:
        """The layer without a cache between others: see `MultiHeadLatentAttention.attend`."""

        def attend(number, x):
            nonlocal relay
            y, relay = self.attentions[number].attend(x, relay, **options)
            return y

        return self._through(x, attend, self.mlp), relay

    def with_routing(
        self,
        x: Float[Array, "B T D"],
        relay: Relay | None = None,
        *,
        valid: Bool[Array, "B T"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Relay | None, Routing]:
        """`attend`, and what the router did: see `Block.with_routing`."""
        routings = []

        def attend(number, x):
            nonlocal relay
            y, relay = self.attentions[number].attend(x, relay, **options)
            return y

        def experts(h):
            y, routing = self.mlp.with_routing(h, valid)
            routings.append(routing)
            return y

        return self._through(x, attend, experts), relay, routings[0]

    def indexer_losses(self, x: Float[Array, "B T D"], **options: Any) -> list[Float[Array, ""]]:
        """None: LongCat-Flash attends to all tokens."""
        del x, options
        return []

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
        grown = []

        def attend(number, x):
            nonlocal relay
            y, store, relay = self.attentions[number].extend(x, stores[number], step, relay)
            grown.append(store)
            return y

        return self._through(x, attend, self.mlp), tuple(grown), relay

    def _through(self, x, attend: Callable[[int, Array], Array], experts: Callable[[Array], Array]):
        x = x + sharding.beside(attend(0, self.attention_norms[0](x)), x)
        h = self.mlp_norms[0](x)
        with jax.named_scope("shortcut"):
            shortcut = experts(h)
        with jax.named_scope("mlp"):
            x = x + sharding.beside(self.mlps[0](h), x)
        x = x + sharding.beside(attend(1, self.attention_norms[1](x)), x)
        with jax.named_scope("mlp"):
            y = sharding.beside(self.mlps[1](self.mlp_norms[1](x)), x)
            return x + y + sharding.beside(shortcut, x)
