"""The relay: what layers of one pass hand to later ones.

A layer with an indexer hands on which slots it has chosen (cross-layer sharing, arXiv 2603.12201);
a layer whose cache others attend to hands on its store. Most models hand on nothing.

Letters: B batch, T query tokens, K chosen slots.
"""

import dataclasses
from typing import Self

import jax
from jaxtyping import Array, Int

from mla_jax.cache import Store


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Relay:
    """What the layers before have handed on.

    Attributes:
        chosen: int32 [B T K], the slots that the last layer with an indexer has chosen; None where
            it attends to all.
        stores: by the numbers of the layers that others attend to.
        chose: whether a layer with an indexer came before.

    >>> Relay().choice()
    Traceback (most recent call last):
    ValueError: indexer_type='shared': no layer with an indexer came before, whose choice this ...
    """

    chosen: Int[Array, "B T K"] | None = None
    stores: dict[int, Store] = dataclasses.field(default_factory=dict)
    chose: bool = dataclasses.field(default=False, metadata={"static": True})

    def choice(self) -> Int[Array, "B T K"] | None:
        """What the last layer with an indexer has chosen, None for all tokens.

        Raises:
            ValueError: no such layer came before.
        """
        if not self.chose:
            raise ValueError(
                "indexer_type='shared': no layer with an indexer came before, whose choice this "
                "one takes: give it the relay that the layers before have returned."
            )
        return self.chosen

    def store(self, layer: int) -> Store:
        """The store that a layer has handed on.

        Raises:
            ValueError: it has not.
        """
        if layer not in self.stores:
            raise ValueError(
                f"kv_source_layer={layer}: that layer has handed no cache on (those that have: "
                f"{sorted(self.stores)}): give this one the relay that the layers before returned."
            )
        return self.stores[layer]

    def with_choice(self, chosen: Int[Array, "B T K"] | None) -> Self:
        """The relay behind a layer with an indexer."""
        return dataclasses.replace(self, chosen=chosen, chose=True)

    def with_store(self, layer: int, store: Store) -> Self:
        """The relay behind a layer that others attend to."""
        return dataclasses.replace(self, stores=self.stores | {layer: store})
