"""A layer that keeps something of every token, and a cache of that layer alone.

Letters: B batch, T tokens, D hidden size.
"""

import abc
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.cache import Cache, Dense
from mla_jax.layers.step import Form, Step
from mla_jax.plain import Plain, Whole
from mla_jax.sharding import Rules


class Mixer(nnx.Module):
    """What mixes tokens: it keeps something of each in a store, and extends it step by step.

    `init_store` and `extend` are the layer's own; a model gives them one step for all layers. With
    `init_cache`, `prefill` and `decode` the layer goes alone.
    """

    @abc.abstractmethod
    def init_store(self, batch_size: Whole, slots: Whole, dtype=None) -> Dense:
        """Slots of its own for every row: what a `Cache` keeps of this layer's tokens."""

    @abc.abstractmethod
    def extend(
        self, x: Float[Array, "B T D"], store: Dense, step: Step, relay: Any = None
    ) -> tuple[Float[Array, "B T D"], Dense, Any]:
        """The layer on the new tokens of a step."""

    @abc.abstractmethod
    def check_input(self, x: Float[Array, "B T D"]) -> tuple[int, int]:
        """B and T, or ValueError: x is not [B T D] of a float dtype."""

    def init_cache(
        self,
        batch_size: Whole,
        max_length: Whole,
        dtype=None,
        pages: Whole | None = None,
        sharding: Rules | None = None,
    ) -> Cache:
        """An empty cache of this layer alone: see `Cache.init`."""
        return Cache.init([self], batch_size, max_length, dtype, pages, sharding)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        lengths: Int[Array, "B"] | Plain | None = None,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | Plain | None = None,
        form: Form = "auto",
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends `lengths[b]` tokens to row b, behind what the cache holds, and attends to all.

        A long prompt may come in chunks, and rows of different lengths share a batch.

        Args:
            x: activations [B T D], rows right-padded.
            cache: of this layer, B rows.
            lengths: int [B], tokens of each row, 0 to T; None is T for all.
            positions: int [T] or [B T]; by default they continue from `cache.length`. Causality and
                a sliding window go by cache slot all the same.
            form: "auto" goes by time where the device's rates are known (`mla_jax.rates`), else by
                operations (`costs.choose_form`): expanded for a prompt, absorbed for a
                short continuation of a long cache.

        Returns:
            outputs [B T D], zeros past a row's length, and the new cache.

        Raises:
            ValueError: arguments that do not go together, or, outside jit, a row that would
                overflow (under jit its `overflowed` is set).
        """
        batch, tokens = self.check_input(x)
        if len(cache.stores) != 1 or cache.batch_size != batch:
            raise ValueError(
                f"cache has {len(cache.stores)} stores of {cache.batch_size} rows: this layer and "
                f"input take one of {batch} rows, of layer.init_cache({batch}, ...)."
            )
        step = Step.begin(cache, tokens, lengths, positions=positions, form=form)
        y, store, _ = self.extend(x, cache.stores[0], step)
        return y, cache.end([store], step)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | Plain | None = None,
        form: Form = "auto",
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends T new tokens (1, or a few drafts) to every row; causal among themselves.

        Args, returns and errors are those of `prefill` without `lengths`.
        """
        return self.prefill(x, cache, positions=positions, form=form)
