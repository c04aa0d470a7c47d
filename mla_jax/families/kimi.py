"""Moonshot's models: Kimi-K2 is DeepSeek-V3; Kimi-Linear and K3 mix MLA with linear attention."""

from typing import Any

from mla_jax.families.decoder import mixture
from mla_jax.families.deepseek import V3, transmla
from mla_jax.families.family import VISION, Family

_LINEAR = {  # KimiLinearConfig of transformers; the shared rotary channels are never rotated
    "vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27, "num_attention_heads": 32,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5,
    "mla_use_nope": True,
}  # fmt: skip


def _linear(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """Counts the layers with MLA; the others are linear attention."""
    del where, layer
    full = (hf.get("linear_attn_config") or {}).get("full_attn_layers")
    if isinstance(full, list):
        hf["num_mla_layers"] = len(full)
    return hf


def _decoder(hf, attention, where):
    return mixture(hf, where)


FAMILIES = (
    Family(
        model_types=("kimi_k2",), architecture="DeepseekV3ForCausalLM", defaults=V3,
        adjust=transmla, decoder=_decoder,
    ),
    Family(
        model_types=("kimi_vl",), defaults=V3, decoder=_decoder, saved_as="deepseek_v3",
        beside=VISION,
    ),
    Family(
        model_types=("kimi_k25",), defaults=V3, decoder=_decoder, saved_as="kimi_k2", beside=VISION,
    ),
    Family(
        model_types=("kimi_linear", "kimi_k3"), defaults=_LINEAR, adjust=_linear,
        renamed={"model_max_length": "max_position_embeddings"},
        refusals={"mla_use_nope": (False, "no implementation of kimi_linear rotates; it must be "
                                          "true")},
    ),
)  # fmt: skip
