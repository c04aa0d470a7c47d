"""OpenBMB's MiniCPM3: dense, rotates half against half, scales embeddings, residuals and logits."""

import math
from typing import Any

from mla_jax.families.decoder import dense, positive
from mla_jax.families.family import Family

_THREE = {  # MiniCPM3Config of transformers
    "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
    "num_attention_heads": 40, "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": None, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "scale_emb": 12, "scale_depth": 1.4,
    "dim_model_base": 256, "eos_token_id": 2, "rope_interleave": False,
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if hf.get("v_head_dim") is None:
        width, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
        if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
            raise ValueError(f"{where} lacks hidden_size or num_attention_heads.")
        hf["v_head_dim"] = width // heads
    return hf


def _decoder(hf, attention, where):
    fields = dense(hf, where)
    for key in ("scale_emb", "scale_depth", "dim_model_base"):
        if hf.get(key) is not None:
            positive(f"{where}: {key}", hf[key])
    if hf.get("scale_emb") is not None:
        fields["embed_scale"] = float(hf["scale_emb"])
    if hf.get("scale_depth") is not None:
        fields["residual_scale"] = hf["scale_depth"] / math.sqrt(attention.num_hidden_layers)
    if hf.get("dim_model_base") is not None:
        fields["logit_scale"] = hf["dim_model_base"] / attention.hidden_size
    return fields


def _written(config, hf):
    for key in ("embed_scale", "residual_scale", "logit_scale"):
        hf.pop(key, None)
    width, root = config.attention.hidden_size, math.sqrt(config.attention.num_hidden_layers)
    return hf | {
        "scale_emb": config.embed_scale,
        "scale_depth": _such_that(lambda d: d / root, config.residual_scale, root),
        "dim_model_base": _such_that(lambda d: d / width, config.logit_scale, width),
    }


def _such_that(quotient, value: float, divisor: float) -> float:
    """What divided gives exactly this value: a round number where there is one."""
    near = value * divisor
    floats = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    candidates = (round(near), round(near, 12), *floats)
    return next((found for found in candidates if quotient(found) == value), near)


FAMILIES = (
    Family(
        model_types=("minicpm3",), architecture="MiniCPM3ForCausalLM", defaults=_THREE,
        adjust=_adjust, decoder=_decoder, written=_written,
    ),
)  # fmt: skip
