"""Tencent's Hy4: learned sinks, gates on channels, rotation of half against half."""

from typing import Any

from mla_jax.families.family import Family
from mla_jax.families.per_layer import count, indexed

_FOUR = {  # HYV4Config of transformers
    "vocab_size": 120832, "hidden_size": 2816, "num_hidden_layers": 34, "num_attention_heads": 32,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "index_topk": 2048,
    "index_n_heads": 16, "index_head_dim": 128, "index_rope_last": True,
    "rope_interleave": False, "attention_sinks": True, "output_gate": "elementwise",
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if not hf.get("index_topk"):
        return hf
    hf.setdefault("index_norm_eps", hf.get("rms_norm_eps", 1e-5))
    if hf.get("indexer_types") is None:
        layers = range(count(hf, where))
        hf["indexer_types"] = ["full" if i == 0 or i % 4 == 1 else "shared" for i in layers]
    return indexed(hf, where, layer)


FAMILIES = (
    Family(
        model_types=("hy_v4",), defaults=_FOUR, adjust=_adjust,
        styles={
            "hy_v4": {"g_proj": "linear_gate", "sinks": "learnable_sink_param"},
            "transformers_hy_v4": {"g_proj": "gate_proj"},
        },
    ),
)  # fmt: skip
