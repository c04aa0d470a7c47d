"""Mistral's models in Hugging Face's files: Small 4 and Large 4.

params.json, Mistral's own config, is read in `families.reading`: it names no family.
"""

from typing import Any

from mla_jax.families.deepseek import NAMES
from mla_jax.families.family import Family
from mla_jax.families.per_layer import count, indexed, kv_source, one_of

_SMALL = {  # Mistral4Config of transformers
    "vocab_size": 131072, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 64, "max_position_embeddings": 1048576,
}  # fmt: skip
_SMALL_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0,
    "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_STYLE = NAMES | {
    "q_a_layernorm": "q_a_norm", "kv_a_proj_with_mqa": "wkv_a_with_mqa",
    "kv_a_layernorm": "kv_a_norm", "softmax_scaling.scale": "ssmax_scaling.s",
    "softmax_scaling.bias": "ssmax_scaling.b",
}  # fmt: skip
_LEARNED = (
    "learns the rotary frequencies: multiply rope.inverse_frequencies by its exp, give "
    "MLAConfig.rope_inv_freq the result and read the tensors by Checkpoint.read"
)


def _small(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf["rope_parameters"] = _SMALL_ROPE
    return hf


def _large(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """Layers without rotation have no rotary channels, only wider others."""
    hf.setdefault("latent_norm_eps", hf.get("rms_norm_eps", 1e-5))
    hf = kv_source(indexed(hf, where, layer), where, layer)
    rotated = hf.get("no_rope_layers")  # 1 where the layer does rotate
    if rotated is None:
        every = hf.get("no_rope_layer_interval", 4)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"{where}: no_rope_layer_interval={every!r} must be at least 1.")
        rotated = [int((i + 1) % every != 0) for i in range(count(hf, where))]
    if one_of(rotated, where, layer, "no_rope_layers"):
        return hf
    nope, rope = hf.get("qk_nope_head_dim"), hf.get("qk_rope_head_dim")
    if not (isinstance(nope, int) and isinstance(rope, int)):
        raise ValueError(f"{where} lacks qk_nope_head_dim or qk_rope_head_dim.")
    # The temperature stays that of the rotated layers, which YaRN may have changed.
    return hf | {"qk_nope_head_dim": nope + rope, "qk_rope_head_dim": 0}


FAMILIES = (
    Family(
        model_types=("mistral4",), defaults=_SMALL, adjust=_small, styles={"mistral": _STYLE},
    ),
    Family(
        model_types=("mistral_large4", "mistral_large4_text"), adjust=_large,
        defaults={
            "q_lora_rank": None, "query_scale_ssmax": True, "index_topk": 2048,
            "index_n_heads": 32, "index_head_dim": 128, "indexer_rope_interleave": True,
            "index_query_scale_ssmax": True, "kv_source_layers": None,
        },
        learned={"lerope.alpha": _LEARNED, "model.language_model.rotary_emb.alpha": _LEARNED},
    ),
)  # fmt: skip
