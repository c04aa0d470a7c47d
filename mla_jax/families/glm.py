"""Zhipu's models: GLM-4.7-Flash, and the GLM-5 that attend sparsely."""

from typing import Any

from mla_jax.families.decoder import mixture
from mla_jax.families.family import Family
from mla_jax.families.per_layer import indexed, indexer_types

_LITE = {  # Glm4MoeLiteConfig of transformers
    "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
    "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20,
    "n_shared_experts": 1, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "eos_token_id": 1,
}  # fmt: skip
_DSA = {  # GlmMoeDsaConfig
    "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "num_hidden_layers": 78, "num_attention_heads": 64,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 2048, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 3, "eos_token_id": 1, "index_topk": 2048, "index_n_heads": 32,
    "index_head_dim": 128, "indexer_rope_interleave": True,
}  # fmt: skip


def _next(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """GLM-5.3-Flash: "full_attention" is its MLA, which is sparse, among layers of another kind."""
    hf.setdefault("latent_norm_eps", hf.get("rms_norm_eps", 1e-5))
    hf.pop("layer_types", None)
    return indexed(hf, where, layer)


def _sparse_decoder(hf, attention, where):
    fields = mixture(hf, where)
    types = indexer_types(hf, where) if attention.index_topk is not None else []
    return fields | ({"indexer_types": types} if "shared" in types else {})


def _written(config, hf):
    count, dense = config.attention.num_hidden_layers, config.first_k_dense_replace
    dense = count if config.n_routed_experts is None else min(dense, count)
    if config.indexer_types is not None:
        hf["indexer_types"] = list(config.indexer_types)
    return hf | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense)}


FAMILIES = (
    Family(
        model_types=("glm4_moe_lite",), architecture="Glm4MoeLiteForCausalLM", defaults=_LITE,
        written=_written,
        decoder=lambda hf, attention, where: mixture(hf, where),
    ),
    Family(
        model_types=("glm_moe_dsa",), architecture="GlmMoeDsaForCausalLM", defaults=_DSA,
        adjust=indexed, decoder=_sparse_decoder, written=_written,
    ),
    Family(
        model_types=("glm5_next", "glm5_next_text"), adjust=_next,
        defaults={
            "mla_use_nope": True, "index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128,
            "index_kpool": 16,
        },
    ),
)  # fmt: skip
