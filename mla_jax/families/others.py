"""openPangu, whose keys have names of their own, and families that need what the layer has not."""

from mla_jax.families.family import Family

FAMILIES = (
    Family(
        model_types=("pangu_ultra_moe",),
        renamed={
            "attention_q_lora_dim": "q_lora_rank", "attention_kv_lora_dim": "kv_lora_rank",
            "attention_qk_dim": "qk_nope_head_dim", "attention_qk_rope_dim": "qk_rope_head_dim",
            "attention_v_dim": "v_head_dim",
        },
    ),
    Family(model_types=("gigachat3_5",), refused="gated norms on the latents"),
    Family(model_types=("motif3",), refused="differential heads"),
    Family(model_types=("pangu_v2_moe",), refused="sparse attention with learned sinks"),
    Family(model_types=("vaetki",), refused="norms that multiply by 1 + weight"),
)  # fmt: skip
