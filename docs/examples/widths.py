import mla_jax
from mla_jax import costs


# --8<-- [start:recipe]
def widths(hidden_size, heads, head_dim=128):
    """A config by the proportions of released models."""
    rank = 4 * head_dim
    return mla_jax.MLAConfig(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        q_lora_rank=3 * rank if heads >= 64 else None,
        kv_lora_rank=rank,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
    )


for config in (widths(2048, 16), widths(7168, 128), widths(512, 8, head_dim=64)):
    cached, heads = costs.cache_numbers(config), config.num_attention_heads
    groups = cached / (2 * config.qk_nope_head_dim)
    print(
        f"D {config.hidden_size}, {heads} heads: {cached} numbers, as GQA with {groups:.2f} groups"
    )
# --8<-- [end:recipe]

# The first is DeepSeek-V2-Lite's, the second DeepSeek-V3's.
for mine, preset in ((widths(2048, 16), "deepseek_v2_lite"), (widths(7168, 128), "deepseek_v3")):
    theirs = mla_jax.MLAConfig.from_preset(preset)
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
        assert getattr(mine, key) == getattr(theirs, key)
