"""SK Telecom's A.X: K1 is DeepSeek-V3; K2's query projection also makes a gate."""

from mla_jax.families.decoder import mixture
from mla_jax.families.family import Family

_ONE = {  # AXK1Config of transformers
    "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
    "n_shared_experts": 1, "n_routed_experts": 192, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "max_position_embeddings": 32768,
    "eos_token_id": 163691,
}  # fmt: skip
_TWO = {  # AXK2Config
    "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "kv_lora_rank": 128, "q_lora_rank": 384, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "qk_nope_head_dim": 64, "max_position_embeddings": 131072, "index_topk": 2048,
    "index_n_heads": 16, "index_head_dim": 128, "output_gate": "query",
}  # fmt: skip
FAMILIES = (
    Family(
        model_types=("axk1", "AXK1"), architecture="AXK1ForCausalLM", defaults=_ONE,
        decoder=lambda hf, attention, where: mixture(hf, where),
    ),
    Family(
        model_types=("axk2",), defaults=_TWO,
        styles={"transformers_axk2": {"q_b_proj": "q_gate_proj"}},
    ),
)  # fmt: skip
