"""Operations, bytes and roofline time of one layer's step, stage by stage."""

import dataclasses

from mla_jax.check import check_choice, check_counts
from mla_jax.config import MLAConfig
from mla_jax.costs.counts import (
    KINDS,
    cache_numbers,
    group_heads,
    index_widths,
    score_widths,
    token_bytes,
    weight_bytes,
)
from mla_jax.costs.peaks import Device

PARTS = {  # stages by what they scale with: the context, the heads' inner widths, everything
    "core": ("expand", "index", "scores", "mixing"),
    "attention": ("pattern", "expand", "index", "scores", "mixing", "values"),
    "layer": ("q_proj", "kv_proj", "index_proj", "pattern", "expand", "index", "scores", "mixing",
              "values", "o_proj"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """Operations of one stage, and bytes it moves: weights, cache (read or written), the rest.

    >>> step = decode_step(MLAConfig.from_preset("deepseek_v3"), 1, 1, 32768)
    >>> scores = step["scores"]
    >>> scores.name, scores.weight_bytes, scores.bytes - scores.cache_bytes
    ('scores', 0, 147456)
    """

    name: str
    flops: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes that the stage moves."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True)
class Costs:
    """One layer's step, by stage: `costs["scores"].flops`. A kind has the stages that it needs.

    q_proj, kv_proj, index_proj, pattern (W_UK into the query), expand (kv_b_proj on S latents),
    index (an indexer's scores), scores, mixing, values (W_UV out of the mixed latents), o_proj.

    >>> from mla_jax.costs import device
    >>> step = decode_step(MLAConfig.from_preset("deepseek_v3"), 1, 1, 32768)
    >>> [stage.name for stage in step.part("attention").stages]
    ['pattern', 'scores', 'mixing', 'values']
    >>> step.part("core").bound(device("h100")), round(step.seconds(device("h100")) * 1e6)
    ('memory', 123)
    """

    kind: str
    stages: tuple[Stage, ...]

    def __getitem__(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: this kind has no such stage.
        """
        stages = {stage.name: stage for stage in self.stages}
        check_choice("stage", name, tuple(stages))
        return stages[name]

    def part(self, name: str) -> "Costs":
        """Only "core" (grows with the context), "attention" (core and folds), or all: "layer".

        Raises:
            ValueError: no part of that name.
        """
        check_choice("part", name, tuple(PARTS))
        return Costs(self.kind, tuple(stage for stage in self.stages if stage.name in PARTS[name]))

    @property
    def flops(self) -> int:
        """Operations of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def bytes(self) -> int:
        """Bytes that all stages move."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    @property
    def rooflines(self) -> list[tuple[int, int]]:
        """Operations and bytes of what runs one after the other: stages, scores with mixing."""
        fused = [stage for stage in self.stages if stage.name in ("scores", "mixing")]
        units = [[stage] for stage in self.stages if stage not in fused] + [fused] * bool(fused)
        return [(sum(s.flops for s in unit), sum(s.bytes for s in unit)) for unit in units]

    def seconds(self, device: Device) -> float:
        """Roofline time: sum over `rooflines` of the longer of operations and bytes, at peak."""
        flops, moved = device.flops_per_second, device.bytes_per_second
        return sum(max(f / flops, b / moved) for f, b in self.rooflines)

    def bound(self, device: Device) -> str:
        """What all stages together are short of: "memory" (bandwidth) or "compute"."""
        return "compute" if self.intensity > device.ridge else "memory"


def decode_step(
    config: MLAConfig, batch: int, queries: int, slots: int, kind: str = "absorbed",
    width: int = 2, cache_dtype: str | None = None, weight_dtype: str | None = None,
) -> Costs:  # fmt: skip
    """One layer's step: T = `queries` new tokens in each of B rows, on S = `slots` cache slots.

    A pass over whole sequences is queries == slots. Norms, rotary embedding, softmax and biases are
    left out, and so is what chooses the best of a sparse layer's scores. Every number is `width`
    bytes wide, but for `cache_dtype` (see `token_bytes`) and `weight_dtype` (see `weight_bytes`).

    Raises:
        ValueError: as `multiply_adds`, or a count that is not a positive whole number; or "sparse"
            for a config without index_topk.

    >>> from mla_jax.costs import device
    >>> v32 = MLAConfig.from_preset("deepseek_v32")
    >>> [round(decode_step(v32, 16, 1, 65536, kind).part("core").seconds(device("h200")) * 1e6)
    ...  for kind in ("absorbed", "sparse")]
    [295, 65]
    >>> costs = decode_step(MLAConfig.from_preset("deepseek_v3"), 1, 1, 32768)
    >>> costs["pattern"].flops, costs["scores"].flops, costs["mixing"].flops
    (16777216, 4831838208, 4294967296)
    >>> costs["scores"].cache_bytes, round(costs.part("core").intensity)
    (37748736, 240)
    """
    check_counts(batch=batch, queries=queries, slots=slots, width=width)
    if kind == "sparse":
        narrow = {"cache_dtype": cache_dtype, "weight_dtype": weight_dtype}
        return _sparse_step(config, batch, queries, slots, width, narrow)
    key, value = score_widths(config, kind)
    d, n, q, r = (config.hidden_size, config.num_attention_heads, config.q_lora_rank,
                  config.kv_lora_rank)  # fmt: skip
    h, v = config.qk_nope_head_dim, config.v_head_dim
    new, context = batch * queries, batch * slots  # tokens of all rows
    cached, latent, heads = cache_numbers(config, kind), r + config.qk_rope_head_dim, n * (h + v)
    held = token_bytes(config, kind, width, cache_dtype)

    def linear(name, tokens, weights, activations, cache=0):  # per token, cache in bytes
        return Stage(name, 2 * tokens * weights, weight_bytes(weights, width, weight_dtype),
                     tokens * cache, width * tokens * activations)  # fmt: skip

    def attend(name, each, read_bytes, in_cache):  # queries in or mixture out; keys or values in
        read = context * read_bytes
        return Stage(name, 2 * new * n * slots * each, 0, read * in_cache,
                     read * (not in_cache) + width * new * n * each)  # fmt: skip

    query = n * (config.qk_head_dim if kind in KINDS[:3] else h)
    if kind not in KINDS[:3] or q is None:
        stages = [linear("q_proj", new, d * query, d + query)]
    else:
        stages = [linear("q_proj", new, d * q + q * query, d + 2 * q + query)]
    if kind == "expanded_cached":
        stages += [linear("kv_proj", new, d * latent + r * heads, d + 2 * latent, held)]
    else:
        stages += [linear("kv_proj", new, d * cached, d, held)]
    if kind == "absorbed":
        stages += [linear("pattern", new, n * h * r, n * (h + r)),
                   attend("scores", key, held, True),
                   attend("mixing", value, 0, True),  # the latents are on the chip already
                   linear("values", new, n * r * v, n * (r + v))]  # fmt: skip
    else:
        if kind == "expanded":
            stages += [linear("expand", context, r * heads, n * (key + value), held)]
        groups = group_heads(config, kind)
        keys, values = width * groups * key, width * groups * value
        stages += [attend("scores", key, keys, kind != "expanded"),
                   attend("mixing", value, values, kind != "expanded")]  # fmt: skip
    return Costs(kind, (*stages, linear("o_proj", new, n * v * d, n * v + d)))


def _sparse_step(
    config: MLAConfig, batch: int, queries: int, slots: int, width: int,
    narrow: dict[str, str | None],
) -> Costs:  # fmt: skip
    """The absorbed step on K slots that each query has chosen for itself, and what chooses them."""
    (heads, keys, chosen), new = index_widths(config), batch * queries
    attended = min(chosen, slots)
    dense = decode_step(config, batch, queries, attended, "absorbed", width, **narrow)
    d, source = config.hidden_size, config.q_lora_rank or config.hidden_size
    weights = d * (keys + heads) + source * heads * keys
    stages = {stage.name: stage for stage in dense.stages}
    if heads:  # none where the choice is another layer's
        made = width * new * (d + source + heads * (keys + 1))
        stages["index_proj"] = Stage(
            "index_proj", 2 * new * weights, width * weights, width * new * keys, made
        )
    if attended < slots:
        held = token_bytes(config, "absorbed", width, narrow["cache_dtype"])
        read = new * attended * held
        stages["scores"] = dataclasses.replace(stages["scores"], cache_bytes=read)
        if heads:
            of_keys = 2 * new * slots * heads * keys, 0, width * batch * slots * keys
            stages["index"] = Stage("index", *of_keys, width * new * heads * keys)
    return Costs("sparse", tuple(stages[name] for name in PARTS["layer"] if name in stages))
