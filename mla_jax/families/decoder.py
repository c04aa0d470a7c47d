"""Fields of `DecoderConfig` from a config.json in DeepSeek's keys, and back.

A family's `decoder` calls `mixture` or `dense`, and adds what only it has.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Fields of DecoderConfig that are keys of config.json.
_WHOLE = (
    "vocab_size", "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "embed_scale",
    "residual_scale", "logit_scale", "num_nextn_predict_layers",
)  # fmt: skip
_EXPERTS = (
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "first_k_dense_replace", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group",
    "topk_group",
)  # fmt: skip
# How the router chooses; "gready" is how DeepSeek-V2's class spells its default.
_METHODS = ("greedy", "gready", "group_limited_greedy", "noaux_tc")


def positive(key: str, value: Any) -> None:
    """Raises where a value is not a positive finite number.

    Raises:
        ValueError: it is not; the message begins with the key.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"{key}={value!r}: it must be a positive number.")


def dense(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a decoder without experts, whatever keys about experts are left in its config."""
    _refuse(hf, where)
    fields = {key: hf[key] for key in _WHOLE if hf.get(key) is not None}
    missing = [key for key in ("vocab_size", "intermediate_size") if key not in fields]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return fields


def mixture(hf: Mapping[str, Any], where: str, *, scoring: str = "sigmoid") -> dict[str, Any]:
    """Fields of DeepSeek's decoder: dense layers, then layers with experts.

    Args:
        hf: the config in DeepSeek's keys.
        where: what to call it in an error.
        scoring: how the router scores where the config does not say.

    Raises:
        ValueError: a key asks for what the decoder does not do.
    """
    fields = dense(hf, where)
    known = {key: hf[key] for key in _EXPERTS if hf.get(key) is not None}
    kinds = hf.get("mlp_layer_types")
    if isinstance(kinds, list):
        first = kinds.index("sparse") if "sparse" in kinds else len(kinds)
        if kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
            raise ValueError(f"{where}: mlp_layer_types={kinds!r}: dense layers must come first.")
        known["first_k_dense_replace"] = first
    if _only_dense(hf, known):
        return fields
    if hf.get("moe_layer_freq") not in (None, 1):
        raise ValueError(f"{where}: moe_layer_freq={hf['moe_layer_freq']!r}: supported is 1.")
    method = hf.get("topk_method")
    if method is not None and method not in _METHODS:
        raise ValueError(f"{where}: topk_method={method!r}: known are {', '.join(_METHODS)}.")
    sigmoid = scoring == "sigmoid" or method == "noaux_tc"
    known.setdefault("scoring_func", "sigmoid" if sigmoid else "softmax")
    if known["scoring_func"] == "sigmoid":
        known.setdefault("norm_topk_prob", True)
    if method in ("greedy", "gready"):
        known |= {"n_group": 1, "topk_group": 1}
    return fields | known


def _only_dense(hf: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether no layer, the block for drafting included, has experts."""
    if known.get("n_routed_experts") is None:
        return True
    first, layers = known.get("first_k_dense_replace", 0), hf.get("num_hidden_layers")
    drafts = hf.get("num_nextn_predict_layers") or 0
    if isinstance(first, int) and isinstance(layers, int) and isinstance(drafts, int):
        return first >= layers + drafts
    return False  # an error that names the key comes where they are validated


def _refuse(hf: Mapping[str, Any], where: str) -> None:
    for key, allowed in (("hidden_act", "silu"), ("mlp_bias", False)):
        if hf.get(key) not in (None, allowed):
            raise ValueError(f"{where}: {key}={hf[key]!r}: supported is {allowed!r}.")


def stop_tokens(given: Any) -> tuple[Any, ...]:
    """eos_token_id as a tuple: it may be null, a token, or a list of them."""
    return tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)


def written(config: Any, model_type: str, dtype: str) -> dict[str, Any]:
    """A `DecoderConfig` in the keys of DeepSeek's config.json: what `mixture` reads.

    Fields at their default are left out where no config class has them.
    """
    attention = config.attention
    hf: dict[str, Any] = {"model_type": model_type, "torch_dtype": dtype}
    for field in dataclasses.fields(attention):
        value = getattr(attention, field.name)
        if value != field.default or field.name in ("rope_theta", "num_hidden_layers",
                                                    "max_position_embeddings"):  # fmt: skip
            hf[field.name] = list(value) if isinstance(value, tuple) else value
    if attention.index_topk is not None:  # families' defaults differ
        for key in ("index_head_dim", "indexer_rope_interleave"):
            hf[key] = getattr(attention, key)
    hf["q_lora_rank"] = attention.q_lora_rank
    hf["num_key_value_heads"] = attention.num_attention_heads
    hf.setdefault("attention_bias", False)
    hf["rope_interleave"] = attention.rope_interleave
    scaling = attention.rope_scaling
    hf["rope_scaling"] = None if scaling is None else {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (dataclasses.asdict(scaling) | {"type": scaling.rope_type}).items()
        if value is not None and (key, value) != ("truncate", True)
    }  # fmt: skip
    whole = {key: getattr(config, key) for key in _WHOLE}
    hf |= {key: value for key, value in whole.items() if not key.endswith("_scale") or value != 1}
    hf["hidden_act"] = "silu"
    if config.n_routed_experts is None:
        # For the family's own code: no layer is behind the dense ones.
        layers = attention.num_hidden_layers + config.num_nextn_predict_layers
        hf |= {"n_routed_experts": None, "first_k_dense_replace": layers}
    else:
        hf |= {key: getattr(config, key) for key in _EXPERTS}
        hf["moe_layer_freq"] = 1
        grouped = "group_limited_greedy" if config.n_group > 1 else "greedy"
        hf["topk_method"] = "noaux_tc" if config.scoring_func == "sigmoid" else grouped
    stop = list(config.eos_token_ids)
    hf["eos_token_id"] = stop[0] if len(stop) == 1 else stop or None
    return hf
