"""DeepSeek-V2, V3, V3.2 and their vision-language models; TransMLA, which writes their configs."""

from typing import Any

from mla_jax.families.decoder import mixture
from mla_jax.families.family import VISION, Family

# DeepseekV2Config and DeepseekV3Config in DeepSeek's own repositories.
V2 = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
    "moe_intermediate_size": 1407, "num_hidden_layers": 30, "num_attention_heads": 32,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "max_position_embeddings": 2048, "topk_method": "greedy",
    "eos_token_id": 100001,
}  # fmt: skip
V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "max_position_embeddings": 4096, "eos_token_id": 1,
}  # fmt: skip
V32 = {  # DeepseekV32Config of transformers
    "max_position_embeddings": 163840, "index_topk": 2048, "index_n_heads": 64,
    "index_head_dim": 128,
}  # fmt: skip
# DeepSeek's own inference code.
NAMES = {
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}  # fmt: skip


def transmla(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """TransMLA's switch for the norms on latents; its biases are not DeepSeek's."""
    if "qk_latent_layernorm" in hf:
        hf["latent_norm"] = hf["qk_latent_layernorm"]
        if hf.get("attention_bias") is True:
            query = "q_proj" if hf.get("q_lora_rank") is None else "q_b_proj"
            hf["attention_bias"] = (query, "kv_a_proj")
    return hf


def _v2_decoder(hf, attention, where):
    return mixture(hf, where, scoring="softmax")


FAMILIES = (
    Family(
        model_types=("deepseek_v3",), architecture="DeepseekV3ForCausalLM", defaults=V3,
        adjust=transmla, styles={"deepseek": NAMES},
        decoder=lambda hf, attention, where: mixture(hf, where),
    ),
    Family(
        model_types=("deepseek_v2",), architecture="DeepseekV2ForCausalLM", defaults=V2,
        adjust=transmla, decoder=_v2_decoder,
    ),
    Family(
        model_types=("deepseek_v32",), architecture="DeepseekV32ForCausalLM",
        defaults=V3 | V32, decoder=lambda hf, attention, where: mixture(hf, where),
    ),
    # It nests DeepSeek-V2's config, and leaves out what equals the defaults above.
    Family(
        model_types=("deepseek_vl_v2",), defaults=V2, adjust=transmla, decoder=_v2_decoder,
        saved_as="deepseek_v2", beside=("vision.", "projector.", "image_newline", "view_seperator",
                                        "tile_indicators"),
    ),
    Family(
        model_types=("dots_vlm",), defaults=V3, saved_as="deepseek_v3",
        beside=(*VISION, "vision_encoder."),
        decoder=lambda hf, attention, where: mixture(hf, where),
    ),
    Family(
        model_types=("deepseek_v4",),
        refused="shared-KV attention with compressed context, which is not MLA",
    ),
)  # fmt: skip
