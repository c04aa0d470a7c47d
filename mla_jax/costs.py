"""What attention costs: numbers read, bytes cached, operations, roofline time, and which form wins.

Plain arithmetic on a config. Decoding reads the whole cache for every new token, so numbers read
per context token set its time until arithmetic takes over. Operations are matrix multiplications
only (a multiply-add is 2), on all S slots as compiled code does them; bytes are what stages read
and write at least, with the scores kept on the chip. Roofline: Williams et al. 2009.

Letters: B batch, T queries (new tokens per row), S slots (the context, new tokens included), N
heads, D hidden_size, Q q_lora_rank, R kv_lora_rank, H qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim, G heads of keys and values.

Kinds of attention, all with the config's N query heads (DeepSeek-V2, arXiv 2405.04434, table 1):
    absorbed         MLA on cached latents, W_UK folded into the query: the form for decoding
    expanded         MLA on cached latents, expanded to keys and values of every head in each step
    expanded_cached  MLA that caches the expanded keys (H+P) and values (V) of every head
    sparse           absorbed on K tokens that an indexer chooses by keys of its own (index_topk)
    mha, gqa, mqa    keys H wide and values V wide, projected from D, for G = N, gcd(N, 8) and 1
                     heads; gqa4 has G = 4, and so on

When is MLA slower than MHA of the same heads? `slower_contexts` and `queries_until_slower` say,
for DeepSeek-V3 in bf16 at the peak rates of an H100 (an H200):
    * Whole layer, one new token: never, at any context and batch. MLA's projections are smaller too
      (187 against 470 million weights), so it leads from the first token.
    * Attention with the two folds (W_UK, W_UV: 34 MB that MHA has not) and no other projection:
      below 530 tokens of context for one row, 25 for 32 rows. Scores and mixing alone: below 4.
    * Many new tokens at once: MHA reads keys and values once for all of them, while MLA does 4.25x
      the arithmetic. Its scores and mixing are slower above 69 (48) new tokens; the whole layer
      with 128 of them in one row from 9,726 (4,997) tokens of context.
Launches are not counted; they decide for a model as small as the preset `tiny`.
"""

import bisect
import dataclasses
import difflib
import functools
import itertools
import math
import tomllib

from mla_jax.config import MLAConfig, configs_dir
from mla_jax.rates import OPERATIONS, Rates

KINDS = ("absorbed", "expanded", "expanded_cached", "mha", "gqa", "mqa")
PARTS = {  # stages by what they scale with: the context, the heads' inner widths, everything
    "core": ("expand", "index", "scores", "mixing"),
    "attention": ("pattern", "expand", "index", "scores", "mixing", "values"),
    "layer": ("q_proj", "kv_proj", "index_proj", "pattern", "expand", "index", "scores", "mixing",
              "values", "o_proj"),
}  # fmt: skip


def _check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{key}={value!r}: {key} must be one of {', '.join(allowed)}.{hint}")


def _check_counts(**counts: object) -> None:
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{key}={value!r}: {key} must be a positive whole number.")


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator's rates: dense bf16 operations, memory bandwidth, bytes of memory.

    Make one from measured rates to replace a data sheet's.

    Raises:
        ValueError: a number that is not positive.

    >>> Device("measured", 9e14, 3e12, 80 * 10**9).ridge
    300.0
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: int

    def __post_init__(self):
        for key in ("flops_per_second", "bytes_per_second", "memory_bytes"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{key}={value!r}: {key} must be a positive number.")

    @property
    def ridge(self) -> float:
        """Operations per byte above which work is bound by arithmetic."""
        return self.flops_per_second / self.bytes_per_second


@functools.cache
def devices() -> dict[str, Device]:
    """The devices of configs/devices.toml by name. The file cites the data sheets.

    >>> list(devices())[:3]
    ['h200', 'h100', 'a100']
    """
    tables = tomllib.loads((configs_dir() / "devices.toml").read_text(encoding="utf-8"))
    return {name: Device(name, **table) for name, table in tables.items()}


def device(name: str) -> Device:
    """One of `devices()`.

    Raises:
        ValueError: no device of that name.

    >>> device("h100").memory_bytes, round(device("h100").ridge, 1)
    (80000000000, 295.2)
    """
    _check_choice("device", name, tuple(devices()))
    return devices()[name]


def _heads(config: MLAConfig, kind: str) -> int:
    """G, heads of keys and values; N for MLA, each of whose heads has its own."""
    heads, groups = config.num_attention_heads, str(kind).removeprefix("gqa")
    if kind != groups and groups.isdecimal():
        if int(groups) == 0 or heads % int(groups):
            raise ValueError(f"kind={kind!r}: groups must divide num_attention_heads={heads}.")
        return int(groups)
    _check_choice("kind", kind, KINDS)
    return {"gqa": math.gcd(heads, 8), "mqa": 1}.get(kind, heads)


def _widths(config: MLAConfig, kind: str) -> tuple[int, int]:
    """Per head: width of what a query is matched against, and of what is mixed."""
    _heads(config, kind)  # checks kind
    if kind == "absorbed":
        return config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    key = config.qk_head_dim if kind in KINDS[:3] else config.qk_nope_head_dim
    return key, config.v_head_dim


def _index_widths(config: MLAConfig) -> tuple[int, int, int]:
    """Index heads, numbers of a token's index key, and tokens that a query attends to."""
    if config.index_topk is None:
        raise ValueError("kind='sparse': index_topk is None: the layer attends to all tokens.")
    heads, keys = config.index_n_heads or 0, config.index_head_dim
    return (heads, keys, config.index_topk) if config.has_indexer else (0, 0, config.index_topk)


def multiply_adds(config: MLAConfig, kind: str) -> int:
    """Multiply-adds per query, head and context token: 2R+P absorbed, H+P+V expanded, else H+V.

    Raises:
        ValueError: no such kind, or groups that do not divide the heads; so in what follows.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> [multiply_adds(v3, kind) for kind in ("absorbed", "expanded", "mha")]
    [1088, 320, 256]
    """
    return sum(_widths(config, kind))


def numbers_read(config: MLAConfig, kind: str) -> int:
    """Numbers that scores and mixing read per context token in one layer, for all heads.

    Absorbed R+P (one pass over the latents serves all heads, scores and mixing), expanded N(H+P+V),
    else G(H+V); N*H of MHA's are keys. Sparse: of the index key; K (R+P) a query do not grow.

    Raises:
        ValueError: as `multiply_adds`.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> [numbers_read(v3, kind) for kind in ("absorbed", "expanded", "mha")]
    [576, 40960, 32768]
    """
    if kind == "absorbed":
        return config.kv_lora_rank + config.qk_rope_head_dim
    if kind == "sparse":
        return _index_widths(config)[1]
    return _heads(config, kind) * multiply_adds(config, kind)


def cache_numbers(config: MLAConfig, kind: str = "absorbed") -> int:
    """Numbers cached per token in one layer: R+P for the layer's two forms, else all that is read.

    Sparse: the index key beside these, in a layer with an indexer.

    Raises:
        ValueError: as `multiply_adds`.

    >>> cache_numbers(MLAConfig.from_preset("deepseek_v3"), "expanded")
    576
    """
    if kind == "sparse":
        return numbers_read(config, "absorbed") + numbers_read(config, "sparse")
    return numbers_read(config, "absorbed" if kind == "expanded" else kind)


def cache_bytes(
    config: MLAConfig, batch: int, length: int, kind: str = "absorbed", width: int = 2, layers=None
) -> int:
    """Bytes of a cache for B = `batch` rows of `length` tokens, numbers `width` bytes wide.

    `layers` is where None what `MLAConfig.mla_layers` counts: not every layer of a hybrid has this
    cache, and a layer of LongCat has two. What a hybrid's other layers hold is not counted.

    Raises:
        ValueError: as `multiply_adds`, or a count that is not a positive whole number.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> cache_bytes(v3, 1, 131072, "mha") / 2**30, round(cache_bytes(v3, 1, 131072) / 2**30, 1)
    (488.0, 8.6)
    >>> cache_bytes(MLAConfig.from_preset("kimi_linear"), 1, 1) / 2**10  # 7 of its 27 layers
    7.875
    """
    layers = config.mla_layers if layers is None else layers
    _check_counts(batch=batch, length=length, width=width, layers=layers)
    return layers * batch * length * cache_numbers(config, kind) * width


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
        _check_choice("stage", name, tuple(stages))
        return stages[name]

    def part(self, name: str) -> "Costs":
        """Only "core" (grows with the context), "attention" (core and folds), or all: "layer".

        Raises:
            ValueError: no part of that name.
        """
        _check_choice("part", name, tuple(PARTS))
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
    config: MLAConfig, batch: int, queries: int, slots: int, kind: str = "absorbed", width: int = 2
) -> Costs:
    """One layer's step: T = `queries` new tokens in each of B rows, on S = `slots` cache slots.

    A pass over whole sequences is queries == slots. Norms, rotary embedding, softmax and biases are
    left out, and so is what chooses the best of a sparse layer's scores. Every number is `width`
    bytes wide.

    Raises:
        ValueError: as `multiply_adds`, or a count that is not a positive whole number; or "sparse"
            for a config without index_topk.

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
    _check_counts(batch=batch, queries=queries, slots=slots, width=width)
    if kind == "sparse":
        return _sparse_step(config, batch, queries, slots, width)
    key, value = _widths(config, kind)
    d, n, q, r = (config.hidden_size, config.num_attention_heads, config.q_lora_rank,
                  config.kv_lora_rank)  # fmt: skip
    h, v = config.qk_nope_head_dim, config.v_head_dim
    new, context = batch * queries, batch * slots  # tokens of all rows
    cached, latent, heads = cache_numbers(config, kind), r + config.qk_rope_head_dim, n * (h + v)

    def linear(name, tokens, weights, activations, cache=0):  # numbers per token; weights once
        return Stage(name, 2 * tokens * weights, width * weights,
                     width * tokens * cache, width * tokens * activations)  # fmt: skip

    def attend(name, each, numbers, in_cache):  # queries in or mixture out; keys or values in
        read = width * context * numbers
        return Stage(name, 2 * new * n * slots * each, 0, read * in_cache,
                     read * (not in_cache) + width * new * n * each)  # fmt: skip

    query = n * (config.qk_head_dim if kind in KINDS[:3] else h)
    if kind not in KINDS[:3] or q is None:
        stages = [linear("q_proj", new, d * query, d + query)]
    else:
        stages = [linear("q_proj", new, d * q + q * query, d + 2 * q + query)]
    if kind == "expanded_cached":
        stages += [linear("kv_proj", new, d * latent + r * heads, d + 2 * latent, cached)]
    else:
        stages += [linear("kv_proj", new, d * cached, d, cached)]
    if kind == "absorbed":
        stages += [linear("pattern", new, n * h * r, n * (h + r)),
                   attend("scores", key, latent, True),
                   attend("mixing", value, 0, True),  # the latents are on the chip already
                   linear("values", new, n * r * v, n * (r + v))]  # fmt: skip
    else:
        if kind == "expanded":
            stages += [linear("expand", context, r * heads, n * (key + value), latent)]
        groups = _heads(config, kind)
        stages += [attend("scores", key, groups * key, kind != "expanded"),
                   attend("mixing", value, groups * value, kind != "expanded")]  # fmt: skip
    return Costs(kind, (*stages, linear("o_proj", new, n * v * d, n * v + d)))


def _sparse_step(config: MLAConfig, batch: int, queries: int, slots: int, width: int) -> Costs:
    """The absorbed step on K slots that each query has chosen for itself, and what chooses them."""
    (heads, keys, chosen), new = _index_widths(config), batch * queries
    attended = min(chosen, slots)
    dense = decode_step(config, batch, queries, attended, "absorbed", width)
    d, source = config.hidden_size, config.q_lora_rank or config.hidden_size
    weights = d * (keys + heads) + source * heads * keys
    stages = {stage.name: stage for stage in dense.stages}
    if heads:  # none where the choice is another layer's
        made = width * new * (d + source + heads * (keys + 1))
        stages["index_proj"] = Stage(
            "index_proj", 2 * new * weights, width * weights, width * new * keys, made
        )
    if attended < slots:
        read = width * new * attended * numbers_read(config, "absorbed")
        stages["scores"] = dataclasses.replace(stages["scores"], cache_bytes=read)
        if heads:
            of_keys = 2 * new * slots * heads * keys, 0, width * batch * slots * keys
            stages["index"] = Stage("index", *of_keys, width * new * heads * keys)
    return Costs("sparse", tuple(stages[name] for name in PARTS["layer"] if name in stages))


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
    _check_counts(slots=slots)
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
    _check_counts(queries=queries)
    fewer = queries <= crossover_queries(config, slots, rates)
    return "absorbed" if fewer or queries == 1 else "expanded"


def compute_bound_queries(config: MLAConfig, device: Device, kind: str = "absorbed") -> float:
    """Queries per step above which bf16 scores and mixing of a long context are compute-bound.

    Absorbed: ridge (R+P) / (N (2R+P)), 156 heads x queries on an H100, 109 on an H200. MHA: ridge.

    Raises:
        ValueError: as `multiply_adds`.

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

    >>> v3, h100 = MLAConfig.from_preset("deepseek_v3"), device("h100")
    >>> slower_contexts(v3, h100), slower_contexts(v3, h100, part="attention")
    ([], [(1, 529)])
    >>> v32 = MLAConfig.from_preset("deepseek_v32")
    >>> [slower_contexts(v32, device("h200"), batch, part="core", against="sparse")
    ...  for batch in (1, 16)]
    [[(2542, None)], [(2542, None)]]
    """
    _check_counts(batch=batch, queries=queries)

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
    config: MLAConfig, device: Device, context: int, batch: int = 1, queries: int = 1, kinds=None
) -> list[Row]:
    """A `Row` for every kind: a bf16 step of `queries` tokens in each row on `context` slots.

    `kinds` are by default `KINDS`, and "sparse" where the config says index_topk.

    Raises:
        ValueError: as `decode_step`.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> row = table(v3, device("h100"), context=32768, batch=8)[0]
    >>> row.kind, row.bound, row.cache_bytes_per_token, round(row.core_seconds * 1e6)
    ('absorbed', 'memory', 70272, 91)
    """
    _check_counts(context=context, batch=batch, queries=queries)
    if kinds is None:
        kinds = KINDS if config.index_topk is None else ("absorbed", "sparse", *KINDS[1:])
    rows = []
    for kind in kinds:
        layer = decode_step(config, batch, queries, context, kind)
        core, cache = layer.part("core"), cache_bytes(config, batch, context, kind)
        numbers, per_token = numbers_read(config, kind), cache_bytes(config, 1, 1, kind)
        times = core.seconds(device), layer.seconds(device), core.bound(device)
        fits = cache <= device.memory_bytes
        rows.append(Row(kind, numbers, per_token, cache, fits, core, layer, *times))
    return rows
