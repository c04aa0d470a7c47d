"""Configs whose attention layers differ: which of them is meant."""

from collections.abc import Mapping, Sequence
from typing import Any


def count(hf: Mapping[str, Any], where: str) -> int:
    """The number of layers.

    Raises:
        ValueError: none, or one that cannot be.
    """
    found = hf.get("num_hidden_layers")
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 10_000:
        raise ValueError(f"{where}: num_hidden_layers={found!r} must be a positive whole number.")
    return found


def one_of(kinds: Any, where: str, layer: int | None, key: str) -> Any:
    """The entry of `layer` in a list of one entry per layer; without a layer, the only one.

    Raises:
        ValueError: no such layer, or none was said and the layers differ.
    """
    if not isinstance(kinds, Sequence) or isinstance(kinds, str) or not kinds:
        raise ValueError(f"{where}: {key}={kinds!r} must be a list with an entry per layer.")
    if layer is not None:
        if not 0 <= layer < len(kinds):
            raise ValueError(f"{where}: layer={layer}: there are layers 0 to {len(kinds) - 1}.")
        return kinds[layer]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{where}: {key}: the model's layers differ: give layer=.")
    return kinds[0]
