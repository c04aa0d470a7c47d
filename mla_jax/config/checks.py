"""What the fields of an `MLAConfig` ask of one another."""

from typing import Any

from mla_jax.check import check, is_int, is_number
from mla_jax.config.rope_scaling import RopeScaling


def check_rope(config: Any) -> None:
    """What the rotary embedding asks of an `MLAConfig`; given frequencies become a tuple."""
    half = config.qk_rope_head_dim // 2
    check(
        config.qk_rope_head_dim % 2 == 0,
        "qk_rope_head_dim",
        config.qk_rope_head_dim,
        "even: rotary channels turn in pairs",
    )
    scaling = config.rope_scaling
    check(
        scaling is None or isinstance(scaling, RopeScaling),
        "rope_scaling",
        scaling,
        "a RopeScaling, a mapping or None",
    )
    given = {"rope_inv_freq": config.rope_inv_freq}
    if scaling is not None and scaling.rope_type == "longrope":
        given["rope_scaling.short_factor"] = scaling.short_factor
        given["rope_scaling.long_factor"] = scaling.long_factor
    for key, value in given.items():
        if value is not None:
            check(
                isinstance(value, list | tuple)
                and len(value) == half
                and all(is_number(v) and v > 0 for v in value),
                key,
                value,
                f"positive numbers, of length qk_rope_head_dim / 2 = {half}",
            )
    if config.rope_inv_freq is not None:
        object.__setattr__(config, "rope_inv_freq", tuple(float(v) for v in config.rope_inv_freq))


def check_together(config: Any) -> None:
    """What one key asks of another."""
    check(
        config.qk_head_dim > 0,
        "qk_nope_head_dim",
        config.qk_nope_head_dim,
        "positive where qk_rope_head_dim is 0",
    )
    check(
        not (config.k_rope_norm and config.qk_rope_head_dim == 0),
        "k_rope_norm",
        True,
        "False where qk_rope_head_dim is 0",
    )
    if config.q_lora_rank is None:
        needless = "False where q_lora_rank is None"
        check(not config.mla_scale_q_lora, "mla_scale_q_lora", True, needless)
        allowed = "another where q_lora_rank is None"
        check(config.output_gate != "query", "output_gate", "query", allowed)
    original = config.llama_4_original_max_position_embeddings
    check(
        (config.llama_4_scaling_beta is None) == (original is None),
        "llama_4_original_max_position_embeddings",
        original,
        "given if and only if llama_4_scaling_beta is",
    )


def check_sparse(config: Any) -> None:
    """What sparse attention and a cache of another layer ask."""
    check(
        config.indexer_type in ("full", "shared"),
        "indexer_type",
        config.indexer_type,
        "'full' or 'shared'",
    )
    for key in ("kv_source_layer", "kv_store_layer"):
        value = getattr(config, key)
        allowed = "a layer's number or None"
        check(value is None or (is_int(value) and value >= 0), key, value, allowed)
    both = config.kv_source_layer is not None and config.kv_store_layer is not None
    needless = "None where kv_source_layer is given: a cache is handed on by its own layer"
    check(not both, "kv_store_layer", config.kv_store_layer, needless)
    if config.index_topk is None:
        shared = config.indexer_type == "shared"
        check(not shared, "indexer_type", "shared", "'full' where index_topk is None")
        check(config.index_kpool is None, "index_kpool", config.index_kpool,
               "None where index_topk is None")  # fmt: skip
        return
    heads = config.index_n_heads
    check(heads is not None, "index_n_heads", heads, "given where index_topk is")
    check(
        config.index_head_dim >= config.qk_rope_head_dim,
        "index_head_dim",
        config.index_head_dim,
        f"at least qk_rope_head_dim={config.qk_rope_head_dim}, channels that are rotated",
    )
    check(config.sliding_window is None, "sliding_window", config.sliding_window,
           "None where index_topk is given")  # fmt: skip
    pool = config.index_kpool or 1
    check(
        config.index_topk % pool == 0,
        "index_topk",
        config.index_topk,
        f"a multiple of index_kpool={pool}",
    )
