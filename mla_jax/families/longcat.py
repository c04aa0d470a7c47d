"""Meituan's LongCat: two attentions a layer, beside a shortcut through its experts."""

from typing import Any

from mla_jax.families.family import Family

_FLASH = {  # LongcatFlashConfig of transformers; its latents are always scaled
    "vocab_size": 131072, "hidden_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 10_000_000.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if hf.get("num_layers") is not None:  # transformers' num_hidden_layers counts the attentions
        hf["num_hidden_layers"] = hf["num_layers"]
    if isinstance(hf.get("num_hidden_layers"), int):
        hf["num_mla_layers"] = 2 * hf["num_hidden_layers"]
    return hf


FAMILIES = (
    Family(
        model_types=("longcat_flash", "longcat_flash_ngram", "longcat_next"), defaults=_FLASH,
        renamed={"num_layers": "num_hidden_layers"}, adjust=_adjust,
        no_decoder="two attentions a layer beside a shortcut through its experts, some of which "
                   "return their input, is not supported",
    ),
)  # fmt: skip
