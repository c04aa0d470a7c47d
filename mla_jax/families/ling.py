"""inclusionAI's Ling and Ring: MLA in every few layers, linear attention in the others."""

from typing import Any

from mla_jax.families.family import Family

_HYBRID = {  # BailingHybridConfig of transformers
    "vocab_size": 157184, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 6_000_000.0,
}  # fmt: skip


def _hybrid(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    # Ling and Ring 2.5 share the model_type with Ling 3, which gates its heads.
    older = "V2_5" in str(hf.get("architectures"))
    hf.setdefault("output_gate", None if older else "head")
    return _counted(hf, where, layer)


def _counted(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """Counts the layers with MLA: the last of every group, and those behind the last whole one."""
    del where, layer
    layers, size = hf.get("num_hidden_layers"), hf.get("layer_group_size")
    if isinstance(layers, int) and isinstance(size, int) and size > 0:
        hf["num_mla_layers"] = layers // size + layers % size
    return hf


FAMILIES = (
    Family(
        model_types=("bailing_hybrid",), defaults=_HYBRID, adjust=_hybrid,
        styles={"bailing": {"o_proj": "dense"}},
    ),
    Family(model_types=("bailing_moe_v2_5", "bailing_moe_linear"), adjust=_counted),
)  # fmt: skip
