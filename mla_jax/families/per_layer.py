"""Configs whose attention layers differ: which of them is meant.

Sparse attention has two such keys: which layers have an indexer (`indexer_types`), and to which
layer's cache each attends (`kv_source_layers`).
"""

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


def indexer_types(hf: Mapping[str, Any], where: str) -> list[str]:
    """Of every layer, "full" where it has an indexer, "shared" where it takes the choice before.

    Raises:
        ValueError: entries that are neither, a first layer that is shared, or too few of them.

    >>> indexer_types({"num_hidden_layers": 8, "index_topk_freq": 4, "index_skip_topk_offset": 3},
    ...               "config")
    ['full', 'full', 'full', 'shared', 'shared', 'shared', 'full', 'shared']
    """
    layers, types = count(hf, where), hf.get("indexer_types")
    if types is None and hf.get("index_topk_pattern") is not None:
        pattern = hf["index_topk_pattern"]
        spelled = isinstance(pattern, str)
        types = [{"F": "full", "S": "shared"}.get(c, c) for c in pattern] if spelled else pattern
    if types is None:
        freq, offset = hf.get("index_topk_freq") or 1, hf.get("index_skip_topk_offset", 2)
        for key, value in (("index_topk_freq", freq), ("index_skip_topk_offset", offset)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{where}: {key}={value!r} must be a whole number of layers.")
        alone = [max(i - offset + 1, 0) % max(freq, 1) == 0 for i in range(layers)]
        types = ["full" if each else "shared" for each in alone]
    fitting = isinstance(types, list | tuple) and len(types) >= layers
    if not fitting or any(kind not in ("full", "shared") for kind in types[:layers]):
        raise ValueError(
            f"{where}: indexer_types={types!r}: it must have 'full' or 'shared' for each of "
            f"num_hidden_layers={layers}."
        )
    if types[0] != "full":
        raise ValueError(
            f"{where}: indexer_types={types!r}: the first layer must be 'full': no choice is there "
            "to be shared."
        )
    return list(types[:layers])


def indexed(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """The config with the layer's `indexer_type`; without a layer, that of one with an indexer."""
    if not hf.get("index_topk"):
        return hf
    kinds = indexer_types(hf, where)
    return hf | {"indexer_type": "full" if layer is None else one_of(kinds, where, layer,
                                                                     "indexer_types")}  # fmt: skip


def kv_source(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """The config with the layer whose cache this one attends to, or that its own is handed on.

    Raises:
        ValueError: a source that is not an earlier layer with a cache of its own; or no layer is
            given and some attend to another's.
    """
    sources = hf.get("kv_source_layers")
    if sources is None:
        return hf
    whole = isinstance(sources, list) and all(
        isinstance(s, int) and 0 <= s <= i and sources[s] == s for i, s in enumerate(sources)
    )
    if not whole:
        raise ValueError(
            f"{where}: kv_source_layers={sources!r}: each entry must be the layer itself, or an "
            "earlier one whose entry is itself."
        )
    if sources == list(range(len(sources))):
        return hf
    if layer is None:
        raise ValueError(f"{where}: kv_source_layers: the model's layers differ: give layer=.")
    source = one_of(sources, where, layer, "kv_source_layers")
    if source != layer:
        return hf | {"kv_source_layer": source}
    return hf | ({"kv_store_layer": layer} if layer in sources[layer + 1 :] else {})
