"""The block for multi-token prediction.

Letters: B batch, T tokens, D hidden size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax.cache import Cache
from mla_jax.layers.experts import Routing
from mla_jax.layers.norm import RMSNorm
from mla_jax.layers.remat import Save, rematerialised
from mla_jax.layers.step import Step
from mla_jax.models.block import Block
from mla_jax.models.config import DecoderConfig
from mla_jax.ops import dense
from mla_jax.plain import Plain


class MultiTokenPredictor(nnx.Module):
    """The block of DeepSeek-V3 that predicts one token further (arXiv 2412.19437, section 2.2).

    From the model's hidden state at position i, after its final norm, and the embedding of the
    token at i + 1, it makes a state whose logits are for the token at i + 2:

        norm(block(eh_proj [enorm(embedding of i + 1), hnorm(state of i)]))

    The block sits at position i and has a latent cache of its own. In place of the model's state it
    takes its own of the position before, which drafts another token. Embedding and head are the
    model's, except where a checkpoint has others: then they are `embed` and `head`.

    Args:
        config: the model's.
        precision, implementation, types: as in `Decoder`.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from mla_jax import MLAConfig
    >>> from mla_jax.models import DecoderConfig, Decoder
    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> config = DecoderConfig(attention=attention, num_nextn_predict_layers=1)
    >>> model = Decoder(config, mtp=True, rngs=nnx.Rngs(0))
    >>> @jax.jit
    ... def drafted(model, tokens):
    ...     hidden, _ = model.extend(tokens, model.init_cache(1, 8))
    ...     cache = model.init_draft_cache(1, 8)
    ...     state, _ = model.draft(hidden[:, :3], tokens[:, 1:], cache)
    ...     return model.draft_logits(state)
    >>> drafted(model, jnp.array([[3, 1, 4, 1]])).shape  # for the three tokens from the third on
    (1, 3, 256)
    """

    def __init__(self, config: DecoderConfig, *, precision, implementation, **types):
        width = config.attention.hidden_size
        norm = functools.partial(RMSNorm, width, epsilon=config.rms_norm_eps, **types)
        self.enorm, self.hnorm, self.norm = norm(), norm(), norm()
        self.eh_proj = nnx.Linear(
            2 * width, width, use_bias=False, precision=precision, **dense.linear("D", None),
            **types,
        )  # fmt: skip
        self.block = Block(
            config, config.attention.num_hidden_layers, precision=precision,
            implementation=implementation, **types,
        )  # fmt: skip
        self.embed: nnx.Embed | None = nnx.data(None)
        self.head: nnx.Linear | None = nnx.data(None)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        *,
        remat: Save | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """States of T positions without a cache, and what the block's router did: training.

        Args:
            hidden: the model's states of these positions.
            embedded: embeddings of the tokens next.
            remat: what the backward pass finds: see `mla_jax.remat_policy`.
            options: as in `Block.with_routing`.
        """
        with jax.named_scope("mtp"):
            x = self._joined(hidden, embedded)
            x, _, routing = rematerialised(self.block.with_routing, remat)(x, **options)
            return self.norm(x), routing

    def extend(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        cache: Cache,
        lengths: Int[Array, "B"] | Plain | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """States of T positions, from those of the model and the embeddings of the tokens next."""
        with jax.named_scope("mtp"):
            step = Step.begin(cache, hidden.shape[1], lengths)
            x, stores, _ = self.block.extend(self._joined(hidden, embedded), cache.stores, step)
            return self.norm(x), cache.end(stores, step)

    def _joined(self, hidden, embedded):
        both = [self.enorm(embedded), self.hnorm(hidden)]
        return sharding.beside(self.eh_proj(jnp.concatenate(both, axis=-1)), embedded)
