"""All kinds of attention side by side, as `mla-jax costs` prints them."""

import dataclasses

from mla_jax.check import check_counts
from mla_jax.config import MLAConfig
from mla_jax.costs.counts import KINDS, cache_bytes, numbers_read
from mla_jax.costs.peaks import Device
from mla_jax.costs.stages import Costs, decode_step


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of attention in `table`: the cache of all layers, costs and times of one.

    Attributes:
        kind: of attention.
        numbers_read: by one layer, per context token.
        cache_bytes_per_token: of all layers.
        cache_bytes: of all layers and rows.
        fits: whether the device can hold these alone.
        core: costs of scores and mixing.
        layer: costs of everything.
        core_seconds: the core's roofline time.
        layer_seconds: the layer's.
        bound: what the core is short of, "memory" or "compute".

    >>> from mla_jax.costs import device
    >>> rows = table(MLAConfig.from_preset("deepseek_v3"), device("h100"), context=32768)
    >>> [row.kind for row in rows if not row.fits]
    ['expanded_cached', 'mha']
    """

    kind: str
    numbers_read: int
    cache_bytes_per_token: int
    cache_bytes: int
    fits: bool
    core: Costs
    layer: Costs
    core_seconds: float
    layer_seconds: float
    bound: str


def table(
    config: MLAConfig, device: Device, context: int, batch: int = 1, queries: int = 1,
    kinds=None, cache_dtype: str | None = None, weight_dtype: str | None = None,
) -> list[Row]:  # fmt: skip
    """A `Row` for every kind: a bf16 step of `queries` tokens in each row on `context` slots.

    `kinds` are by default `KINDS`, and "sparse" where the config says index_topk. `cache_dtype` is
    of MLA's latents, `weight_dtype` of all weights: see `token_bytes` and `weight_bytes`.

    Raises:
        ValueError: as `decode_step`.

    >>> from mla_jax.costs import device
    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> row = table(v3, device("h100"), context=32768, batch=8)[0]
    >>> row.kind, row.bound, row.cache_bytes_per_token, round(row.core_seconds * 1e6)
    ('absorbed', 'memory', 70272, 91)
    """
    check_counts(context=context, batch=batch, queries=queries)
    if kinds is None:
        kinds = KINDS if config.index_topk is None else ("absorbed", "sparse", *KINDS[1:])
    rows = []
    for kind in kinds:
        held = {"kind": kind, "cache_dtype": cache_dtype}
        layer = decode_step(config, batch, queries, context, **held, weight_dtype=weight_dtype)
        core, cache = layer.part("core"), cache_bytes(config, batch, context, **held)
        numbers, per_token = numbers_read(config, kind), cache_bytes(config, 1, 1, **held)
        times = core.seconds(device), layer.seconds(device), core.bound(device)
        fits = cache <= device.memory_bytes
        rows.append(Row(kind, numbers, per_token, cache, fits, core, layer, *times))
    return rows
