"""Tencent's Youtu-LLM: dense, with tied embeddings."""

from mla_jax.families.decoder import dense
from mla_jax.families.family import Family

_TWO_B = {  # YoutuConfig of transformers
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
    "num_attention_heads": 16, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "eos_token_id": 128001,
}  # fmt: skip
FAMILIES = (
    Family(
        model_types=("youtu", "youtu_llm"), architecture="YoutuForCausalLM", defaults=_TWO_B,
        decoder=lambda hf, attention, where: dense(hf, where),
    ),
)  # fmt: skip
