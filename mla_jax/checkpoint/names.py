"""The names that families give the same attention tensors.

Everything inside uses Hugging Face's DeepSeek names relative to "self_attn."; `canonical` maps any
family's to them, `rename` maps back.
"""

import re

# Parameters of the layer by Hugging Face's names, without ".weight" or ".bias".
MODULES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "k_rope_norm": "k_rope_only_layernorm",
    "kv_b_proj": "kv_b_proj",
    "g_proj": "g_proj",
    "o_proj": "o_proj",
}
VECTORS = {  # whole names: these have no ".weight"
    "sinks": "sinks",
    "ssmax_scale": "softmax_scaling.scale",
    "ssmax_bias": "softmax_scaling.bias",
}

_DEEPSEEK = {  # DeepSeek's own inference code
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}  # fmt: skip
STYLES: dict[str, dict[str, str]] = {
    "huggingface": {},
    "bailing": {"o_proj": "dense"},
    "hy_v4": {"g_proj": "linear_gate", "sinks": "learnable_sink_param"},
    "deepseek": _DEEPSEEK,
    "mistral": _DEEPSEEK | {
        "q_a_layernorm": "q_a_norm", "kv_a_proj_with_mqa": "wkv_a_with_mqa",
        "kv_a_layernorm": "kv_a_norm", "softmax_scaling.scale": "ssmax_scaling.s",
        "softmax_scaling.bias": "ssmax_scaling.b",
    },
    "transformers_hy_v4": {"g_proj": "gate_proj"},
    "transformers_axk2": {"q_b_proj": "q_gate_proj"},
}  # fmt: skip
_CANONICAL = {theirs: ours for style in STYLES.values() for ours, theirs in style.items()}

# Tensors beside the weights that say nothing about them: buffers and scales of activations.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|qscale_act|input_scale|activation_scale)$")
# What an fp8 weight's scale is called: the weight's own name, less "weight", and one of these.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")

# Where a model keeps its layers; whatever stands before "layers." is the root.
_LAYER = re.compile(
    r"(?P<root>(?:[^.]+\.)*?)layers\.(?P<layer>\d+)\.(?P<part>self_attn|attention|attn)\."
    r"(?:(?P<nth>\d)\.)?(?P<name>.+)"
)
_LATENT = re.compile(r"(kv_a_proj_with_mqa|wkv_a_with_mqa|wkv_a)\.weight")


def canonical(name: str) -> str:
    """Hugging Face's name of an attention tensor, relative to "self_attn.", from any family's."""
    if name in _CANONICAL:
        return _CANONICAL[name]
    module, dot, kind = name.rpartition(".")
    return _CANONICAL.get(module, module) + dot + kind


def rename(name: str, style: str) -> str:
    """The inverse of `canonical`, for one of `STYLES`."""
    if style not in STYLES:
        raise ValueError(f"names={style!r}: it must be one of {', '.join(STYLES)}.")
    names = STYLES[style]
    if name in names:
        return names[name]
    module, dot, kind = name.rpartition(".")
    return names.get(module, module) + dot + kind


def attention_prefixes(names) -> dict[tuple[int, int], str]:
    """(layer, which attention of it) to the prefix of its tensors, for every layer with latents.

    Multi-token-prediction blocks that live beside the layers ("mtp.") are left out; those that
    follow them under the next number are not: only the config knows how many layers there are.

    Raises:
        ValueError: latents under several roots, so that it is open which are the model's.
    """
    prefixes: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None or _LATENT.fullmatch(match["name"]) is None:
            continue
        if "mtp" in match["root"].split("."):
            continue
        key = (int(match["layer"]), int(match["nth"] or 0))
        prefix = name[: match.start("name")]
        prefixes.setdefault(match["root"], {})[key] = prefix
    if len(prefixes) > 1:
        raise ValueError(f"several models have latent attention here: {sorted(prefixes)}.")
    return next(iter(prefixes.values()), {})
