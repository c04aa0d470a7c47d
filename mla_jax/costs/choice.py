"""Which is faster: the absorbed form or the expanded, MLA or another kind of attention."""

import bisect
import itertools
import math

from mla_jax.check import check_counts
from mla_jax.config import MLAConfig
from mla_jax.costs.counts import multiply_adds, numbers_read
from mla_jax.costs.peaks import Device
from mla_jax.costs.stages import decode_step
from mla_jax.rates import OPERATIONS, Rates


def crossover_queries(config: MLAConfig, slots: int, rates: Rates = OPERATIONS) -> float:
    """T*, queries at which both forms cost the same operations, or time, on S cached latents.

    Per head, absorbed takes T (R(H+V) + S(2R+P)) multiply-adds and expanded S R(H+V) + T S (H+P+V):
    equal at 1/T* = 1/T0 + 1/S with T0 = R(H+V)/(2R-H-V), infinite where 2R <= H+V. Sparse attention
    to K < S tokens mixes K latents absorbed, while expanded makes and masks all S. With `rates`
    (`mla_jax.rates`) every term counts by how fast the device runs it.

    Raises:
        ValueError: slots are not a positive whole number.

    >>> round(crossover_queries(MLAConfig.from_preset("deepseek_v3"), 10**9), 1)
    170.7
    """
    check_counts(slots=slots)
    fold = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim) / rates.products
    ours = multiply_adds(config, "absorbed") / rates.absorbed
    theirs = multiply_adds(config, "expanded") / rates.expanded
    attended = slots
    if config.index_topk is not None and config.is_sparse(slots):
        attended = config.index_topk
    wider = max(0, attended * ours - slots * theirs)
    return slots * fold / (fold + wider)


def choose_form(config: MLAConfig, queries: int, slots: int, rates: Rates = OPERATIONS) -> str:
    """The form with fewer operations, "absorbed" or "expanded", or less time by a device's rates.

    One query is always absorbed.

    Raises:
        ValueError: queries or slots are not a positive whole number.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> choose_form(v3, 1, 1), choose_form(v3, 163, 4096), choose_form(v3, 164, 4096)
    ('absorbed', 'absorbed', 'expanded')
    """
    check_counts(queries=queries)
    fewer = queries <= crossover_queries(config, slots, rates)
    return "absorbed" if fewer or queries == 1 else "expanded"


def compute_bound_queries(config: MLAConfig, device: Device, kind: str = "absorbed") -> float:
    """Queries per step above which bf16 scores and mixing of a long context are compute-bound.

    Absorbed: ridge (R+P) / (N (2R+P)), 156 heads x queries on an H100, 109 on an H200. MHA: ridge.

    Raises:
        ValueError: as `multiply_adds`.

    >>> from mla_jax.costs import device
    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> [round(compute_bound_queries(v3, device(name)), 2) for name in ("h100", "h200")]
    [1.22, 0.85]
    """
    operations = config.num_attention_heads * multiply_adds(config, kind)  # a 2 cancels bf16's 2
    return device.ridge * numbers_read(config, kind) / operations


def queries_until_slower(config: MLAConfig, device: Device, against: str = "mha") -> float:
    """Queries per step above which the absorbed core is slower than `against`; long context, bf16.

    There its operations take longer than the other's one reading of keys and values for all
    queries: ridge (H+V) / (2R+P) for MHA. 0 where even one pass over the latents is longer,
    infinite where absorbed has no more operations than the other.

    Raises:
        ValueError: as `multiply_adds`.

    >>> from mla_jax.costs import device
    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> [round(queries_until_slower(v3, device(name)), 1) for name in ("h100", "h200")]
    [69.5, 48.5]
    """
    read, ours = numbers_read(config, against), multiply_adds(config, "absorbed")
    if read < numbers_read(config, "absorbed"):
        return 0.0
    if ours <= multiply_adds(config, against):
        return math.inf
    return device.ridge * read / (config.num_attention_heads * ours)


def slower_contexts(
    config: MLAConfig, device: Device, batch=1, queries=1, part="layer", against="mha"
) -> list[tuple[int, int | None]]:
    """Context lengths S >= T at which absorbed MLA has a longer roofline time than `against`, bf16.

    `part`: "layer"; "attention", as if all other projections cost the same; or "core". With
    against="sparse" these are the contexts at which choosing tokens pays. Returns the first and
    last length of every interval, None where it has no end; [] where MLA is never slower.
    One that spans less than a twentieth of its own length may be overlooked.

    Raises:
        ValueError: as `decode_step`, or no part of that name.

    >>> from mla_jax.costs import device
    >>> v3, h100 = MLAConfig.from_preset("deepseek_v3"), device("h100")
    >>> slower_contexts(v3, h100), slower_contexts(v3, h100, part="attention")
    ([], [(1, 529)])
    >>> v32 = MLAConfig.from_preset("deepseek_v32")
    >>> [slower_contexts(v32, device("h200"), batch, part="core", against="sparse")
    ...  for batch in (1, 16)]
    [[(2542, None)], [(2542, None)]]
    """
    check_counts(batch=batch, queries=queries)

    def slower(slots):
        steps = (decode_step(config, batch, queries, slots, kind) for kind in ("absorbed", against))
        ours, theirs = (step.part(part).seconds(device) for step in steps)
        return ours > theirs

    contexts = [queries]
    while contexts[-1] < 2**40:
        contexts.append(contexts[-1] * 21 // 20 + 1)
    edges = [queries] if slower(queries) else []  # where slower() changes
    for before, after in itertools.pairwise(contexts):
        if (was := slower(before)) != slower(after):
            between = range(before, after)
            edges.append(before + bisect.bisect(between, False, key=lambda s: slower(s) != was))
    ends = [edge - 1 for edge in edges[1::2]]
    return list(itertools.zip_longest(edges[::2], ends))
