"""Writes the reference activations of the families' own code: python tests/testdata/make.py.

Needs torch and transformers, which nothing else here does; CPU, float32, seeded random weights.
Sparse families run with an indexer that selects every token, and their config says so by leaving
index_topk null: what is left is the dense attention that this layer computes.
"""

import importlib
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

# Small, odd where a family allows it.
WIDTHS = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
    q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, beta_fast=32.0, beta_slow=1.0,
            original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LONG = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=12,
            short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 7.0])  # fmt: skip
SLIDING = {k: WIDTHS[k] for k in ("num_attention_heads", "num_key_value_heads", "q_lora_rank",
           "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}  # fmt: skip

# name: (module, config class, attention class, config, options)
CASES = {
    "youtu_half": ("youtu", "YoutuConfig", "YoutuAttention",
                   dict(rope_parameters=DEFAULT, rope_interleave=False), {}),
    "axk1_bias": ("axk1", "AXK1Config", "AXK1Attention",
                  dict(rope_parameters=YARN, attention_bias=True), {}),
    "deepseek_v3_no_nope": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3Attention",
                            dict(rope_parameters=DEFAULT, qk_nope_head_dim=0), {}),
    "minicpm3_long": ("minicpm3", "MiniCPM3Config", "MiniCPM3Attention",
                      dict(rope_parameters=LONG, max_position_embeddings=48, hidden_size=36),
                      {"pad": 0}),
    "bailing_hybrid": ("bailing_hybrid", "BailingHybridConfig", "BailingHybridAttention",
                       dict(rope_parameters=YARN, q_lora_rank=None, layer_group_size=1), {}),
    "mistral4": ("mistral4", "Mistral4Config", "Mistral4Attention",
                 dict(rope_parameters=YARN | dict(original_max_position_embeddings=64,
                      llama_4_scaling_beta=0.1, factor=128.0)), {"start": 180, "pad": 0}),
    "mistral_large4": ("mistral_large4", "MistralLarge4TextConfig", "MistralLarge4TextAttention",
                       dict(no_rope_layers=[1], rms_norm_eps=1e-3,
                            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0,
                                factor=2048.0, original_max_position_embeddings=512,
                                attention_factor=1.0)), {"dense": True}),
    "mistral_large4_no_rope": ("mistral_large4", "MistralLarge4TextConfig",
                               "MistralLarge4TextAttention",
                               dict(no_rope_layers=[0], rms_norm_eps=1e-3), {"dense": True}),
    "hy_v4": ("hy_v4", "HYV4Config", "HYV4Attention", dict(rope_parameters=DEFAULT),
              {"dense": True}),
    "axk2": ("axk2", "AXK2Config", "AXK2Attention", dict(rope_parameters=DEFAULT),
             {"dense": True}),
    "glm5_next": ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextAttention",
                  dict(qk_rope_head_dim=0, rms_norm_eps=1e-3), {"dense": True}),
    "dots3_sliding": ("dots3_note", "Dots3NoteTextConfig", "Dots3NoteTextAttention",
                      dict(layer_types=["sliding_attention"], sliding_window=5, rms_norm_eps=1e-3,
                           per_layer_config={0: SLIDING | dict(qk_rope_head_dim=8, head_dim=18)},
                           rope_parameters={"sliding_attention": DEFAULT}), {"window": 5}),
}  # fmt: skip


def call_with(function, **arguments):
    """Calls with the arguments that the function's signature or its **kwargs can take."""
    code = function.__wrapped__.__code__ if hasattr(function, "__wrapped__") else None
    names = (code or function.__func__.__code__).co_varnames
    return function(**{k: v for k, v in arguments.items() if k in names})


def make(name):
    module, config_class, attention_class, changes, options = CASES[name]
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    widths = {k: v for k, v in WIDTHS.items() if k != "q_lora_rank" or "large4" not in module}
    config = getattr(configs, config_class)(**(widths | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(sum(map(ord, name)))
    attention = getattr(code, attention_class)(config, layer_idx=0).eval()
    with torch.no_grad():
        for key, parameter in attention.named_parameters():
            noise = torch.randn_like(parameter)
            gain = parameter.ndim == 1 and ("norm" in key or "scale" in key)
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(1 + 0.3 * noise if gain else noise * fan_in**-0.5)

    batch, tokens, pad = 2, 24, options.get("pad", 3)
    x = torch.randn(batch, tokens, config.hidden_size) * (0.05 if "rms_norm_eps" in changes else 1)
    real = torch.ones(batch, tokens, dtype=torch.long)
    real[1, :pad] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0) + options.get("start", 0)
    index = torch.arange(tokens)
    seen = (index[None] <= index[:, None])[None] & (real[:, None] == 1)
    if "window" in options:
        seen &= (index[:, None] - index[None] < options["window"])[None]
    mask = torch.zeros(batch, 1, tokens, tokens).masked_fill(~seen[:, None], -1e30)

    embeddings = None
    rotary = [c for c in vars(code) if c.endswith("RotaryEmbedding")
              and "Vision" not in c and "Audio" not in c]  # fmt: skip
    if rotary and config.qk_rope_head_dim:
        layer_type = {"layer_type": "sliding_attention"} if "window" in options else {}
        embeddings = getattr(code, rotary[0])(config)(x, positions, **layer_type)
    if options.get("dense"):
        chosen = index.expand(batch, tokens, tokens)
        if module == "glm5_next":  # its indexer answers for causality and padding too
            chosen = torch.where(seen, chosen, -1)
        attention._modules.pop("indexer", None)
        attention.__dict__["indexer"] = lambda *args, **kwargs: chosen
    with torch.no_grad():
        out = call_with(
            attention.forward, hidden_states=x, position_embeddings=embeddings,
            attention_mask=mask,
            position_ids=positions, shared_kv_states={}, kwargs={},
        )[0]  # fmt: skip

    saved = config.to_dict()
    keep = set(WIDTHS) | {
        "model_type", "rms_norm_eps", "attention_bias", "rope_interleave", "head_dim",
        "max_position_embeddings", "rope_parameters", "layer_types", "no_rope_layers",
        "kv_source_layers", "per_layer_config", "sliding_window", "index_topk", "architectures",
    }  # fmt: skip
    saved = {k: v for k, v in saved.items() if k in keep}
    if options.get("dense"):
        saved["index_topk"] = None
    hub = {k: v for k, v in saved.items() if k != "rope_parameters"}
    rope = saved.get("rope_parameters") or {}
    rope = dict(rope.get("sliding_attention", rope))
    hub["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if "window" in options:  # the hub's names of a sliding layer's widths
        hub.pop("per_layer_config")
        widths = saved["per_layer_config"]
        widths = widths.get("0", widths.get(0))
        widths = {k: saved[k] for k in SLIDING} | widths  # it holds what differs
        hub |= {f"swa_{k}": v for k, v in widths.items()}
        hub["swa_rope_theta"] = hub["rope_theta"]
    rope["type"] = rope.pop("rope_type", "default")
    hub["rope_scaling"] = None if rope["type"] == "default" else rope
    meta = {
        "case": name, "family": module, "attention_class": attention_class, "atol": 2e-5,
        "rtol": 1e-4, "schedule": [12, 7, 1, 1, 3], "start": options.get("start", 0),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    arrays = {f"w/{k}": v.detach().numpy() for k, v in attention.state_dict().items()
              if not k.startswith("indexer")}  # fmt: skip
    folder = pathlib.Path(__file__).parent
    np.savez_compressed(
        folder / f"{name}.npz", config=json.dumps(saved), config_hub=json.dumps(hub),
        meta=json.dumps(meta), **arrays,
        **{"in/hidden_states": x.numpy(), "in/position_ids": positions.numpy(),
           "in/attention_mask": real.numpy(), "out/full": out.numpy()},
    )  # fmt: skip
    print(name, tuple(out.shape), float(out.abs().mean()))


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
