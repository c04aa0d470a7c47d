"""Sarvam-105B: queries are projected directly, experts come in groups of eight."""

from typing import Any

from mla_jax.families.decoder import mixture
from mla_jax.families.family import Family

_MLA = {  # SarvamMLAConfig of vLLM, which mirrors the released one
    "vocab_size": 262144, "hidden_size": 4096, "intermediate_size": 16384,
    "moe_intermediate_size": 2048, "num_hidden_layers": 32, "num_attention_heads": 64,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_position_embeddings": 4096, "eos_token_id": 1,
}  # fmt: skip
# What its code takes where rope_scaling is null.
_YARN = {
    "rope_type": "deepseek_yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if hf.get("rope_parameters") is None:
        hf["rope_scaling"] = hf.get("rope_scaling") or _YARN
    return hf


def _decoder(hf, attention, where):
    experts = hf.get("n_routed_experts")
    if isinstance(experts, int):
        groups = max(1, experts // 8)
        hf = {"n_group": groups, "topk_group": min(2, groups)} | dict(hf)
    return mixture(hf, where)


def _written(config, hf):
    for ours, theirs in (("n_routed_experts", "num_experts"),
                         ("n_shared_experts", "num_shared_experts")):  # fmt: skip
        if ours in hf:
            hf[theirs] = hf.pop(ours)
    if config.attention.rope_scaling is None:
        hf["rope_parameters"] = {
            "rope_type": "default", "rope_theta": config.attention.rope_theta,
        }  # fmt: skip
    return hf


FAMILIES = (
    Family(
        model_types=("sarvam_mla",), architecture="SarvamMLAForCausalLM", defaults=_MLA,
        adjust=_adjust, decoder=_decoder,
        renamed={"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
        written=_written,
    ),
)  # fmt: skip
