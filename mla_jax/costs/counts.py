"""Numbers read, numbers and bytes cached, and multiply-adds, per token of context."""

import math

from mla_jax.check import check_choice, check_counts
from mla_jax.config import MLAConfig

KINDS = ("absorbed", "expanded", "expanded_cached", "mha", "gqa", "mqa")


def group_heads(config: MLAConfig, kind: str) -> int:
    """G, heads of keys and values; N for MLA, each of whose heads has its own."""
    heads, groups = config.num_attention_heads, str(kind).removeprefix("gqa")
    if kind != groups and groups.isdecimal():
        if int(groups) == 0 or heads % int(groups):
            raise ValueError(f"kind={kind!r}: groups must divide num_attention_heads={heads}.")
        return int(groups)
    check_choice("kind", kind, KINDS)
    return {"gqa": math.gcd(heads, 8), "mqa": 1}.get(kind, heads)


def score_widths(config: MLAConfig, kind: str) -> tuple[int, int]:
    """Per head: width of what a query is matched against, and of what is mixed."""
    group_heads(config, kind)  # checks kind
    if kind == "absorbed":
        return config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    key = config.qk_head_dim if kind in KINDS[:3] else config.qk_nope_head_dim
    return key, config.v_head_dim


def index_widths(config: MLAConfig) -> tuple[int, int, int]:
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
    return sum(score_widths(config, kind))


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
        return index_widths(config)[1]
    return group_heads(config, kind) * multiply_adds(config, kind)


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


def token_bytes(
    config: MLAConfig, kind: str = "absorbed", width: int = 2, cache_dtype: str | None = None
) -> int:
    """Bytes cached per token in one layer, numbers `width` bytes wide.

    With `cache_dtype` float8_e4m3fn or int8 the latents of MLA's forms take a byte a number, and 4
    bytes of scale for every 128; index keys and other kinds stay as they are.

    Raises:
        ValueError: as `multiply_adds`, or another cache_dtype.

    >>> v3 = MLAConfig.from_preset("deepseek_v3")
    >>> token_bytes(v3), token_bytes(v3, cache_dtype="float8_e4m3fn")
    (1152, 656)
    """
    if cache_dtype is not None:
        check_choice("cache_dtype", cache_dtype, ("float8_e4m3fn", "int8"))
        if kind in (*KINDS[:2], "sparse"):
            rank = config.kv_lora_rank
            others = cache_numbers(config, kind) - rank
            return rank + 4 * math.ceil(rank / 128) + others * width
    return cache_numbers(config, kind) * width


def weight_bytes(count: int, width: int = 2, weight_dtype: str | None = None) -> int:
    """Bytes of `count` weights, `width` bytes wide or as a checkpoint stores them.

    Those are float8_e4m3fn (4 bytes of scale for every block of 128 x 128), int8 (scales of rows,
    which are not counted), or int4 (2 bytes of scale for every 32).

    Raises:
        ValueError: another weight_dtype.

    >>> weight_bytes(2**14), weight_bytes(2**14, weight_dtype="int4")
    (32768, 9216)
    """
    if weight_dtype is None:
        return count * width
    stored = {"float8_e4m3fn": 1 + 4 / 128**2, "int8": 1.0, "int4": 0.5 + 2 / 32}
    check_choice("weight_dtype", weight_dtype, tuple(stored))
    return math.ceil(count * stored[weight_dtype])


def cache_bytes(
    config: MLAConfig, batch: int, length: int, kind: str = "absorbed", width: int = 2,
    layers=None, cache_dtype: str | None = None,
) -> int:  # fmt: skip
    """Bytes of a cache for B = `batch` rows of `length` tokens: see `token_bytes`.

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
    check_counts(batch=batch, length=length, width=width, layers=layers)
    return layers * batch * length * token_bytes(config, kind, width, cache_dtype)
