"""Writes tiny whole models and their logits: python tests/testdata/make_decoder.py.

Needs torch and transformers; CPU, float32, seeded random weights, as the hub's files hold them.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

ATTENTION = dict(
    hidden_size=24, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=12, kv_lora_rank=16,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, num_hidden_layers=3, vocab_size=40,
    intermediate_size=20, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip
MOE = dict(moe_intermediate_size=10, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
           first_k_dense_replace=1)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, beta_fast=32, beta_slow=1,
            original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.7)  # fmt: skip
CASES = {
    "deepseek_v2": ("DeepseekV2", ATTENTION | MOE | dict(
        rope_parameters=YARN, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=1.7, q_lora_rank=None)),
    "deepseek_v3": ("DeepseekV3", ATTENTION | MOE | dict(
        rope_parameters=ROPE, n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "glm4_moe_lite": ("Glm4MoeLite", ATTENTION | MOE | dict(
        rope_parameters=ROPE, n_group=1, topk_group=1, routed_scaling_factor=1.8,
        mlp_layer_types=["dense", "sparse", "sparse"])),
    "youtu": ("Youtu", ATTENTION | dict(rope_parameters=ROPE, tie_word_embeddings=True)),
    "minicpm3": ("MiniCPM3", ATTENTION | dict(
        rope_parameters=ROPE, tie_word_embeddings=True, dim_model_base=8, scale_emb=3)),
}  # fmt: skip

for name, (prefix, keys) in CASES.items():
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{prefix}Config")(**keys)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "embed_scale" in key:
                continue
            noise = torch.randn_like(value)
            if "norm" in key:
                value.copy_(1 + 0.2 * noise)
            elif "e_score_correction_bias" in key:
                value.copy_(0.3 * noise - 0.5)  # negative: a masked 0 would win
            elif "inv_freq" not in key:
                value.copy_(noise * (1.0 if "embed" in key else value.shape[-1] ** -0.5))
    folder = pathlib.Path(__file__).parent / "decoders" / name
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, config.vocab_size, (2, 11))
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=-1,
                                pad_token_id=0)[:, 11:]  # fmt: skip
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy(),
                        greedy=greedy.numpy())  # fmt: skip
    keys = json.loads((folder / "config.json").read_text())
    print(name, keys["model_type"], float(logits.std()), len(list(folder.glob("*.safetensors"))))
