"""What a model's config.json says about its attention, and what only its code says.

`attention_fields` turns a Hugging Face config (the hub's style or transformers 5's), or Mistral's
params.json, into fields of `MLAConfig`. Where a family's code does something that its config does
not mention, `_FAMILIES` says so; what the layer cannot do is refused by the key that asks for it.

Implementations disagree on two points, and the choice here is a field that can be replaced:
* latent_norm_eps: transformers keeps 1e-6 for most families, vLLM and SGLang use rms_norm_eps.
  Here: transformers.
* Mistral's `apply_scale: false`: Mistral's own code (vLLM, SGLang) leaves the softmax temperature
  alone; transformers' config.json, which has no such key, multiplies it by mscale^2. Here: each
  file as its own code reads it.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.config import MLAConfig, RopeScaling

# What a family's code does where its config.json says nothing.
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_vl_v2": {},
    "dots_vlm": {},
    "kimi_k2": {},
    "kimi_k25": {},
    "kimi_vl": {},
    "kimi_linear": {"mla_use_nope": True},
    "kimi_k3": {"mla_use_nope": True},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "glm5_next": {"latent_norm_eps": "rms_norm_eps", "mla_use_nope": True},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_next": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "minicpm3": {"rope_interleave": False},
    "youtu": {},
    "youtu_llm": {},
    "axk1": {},
    "AXK1": {},
    "axk2": {"output_gate": "query"},
    "pangu_ultra_moe": {},
    "sarvam_mla": {"q_lora_rank": None},
    "bailing_hybrid": {"output_gate": "head", "rope_theta": 6_000_000.0},
    "bailing_moe_v2_5": {},
    "bailing_moe_linear": {},
    "mistral4": {},
    "mistral_large4": {
        "q_lora_rank": None, "query_scale_ssmax": True, "latent_norm_eps": "rms_norm_eps",
    },
    "hy_v4": {"rope_interleave": False, "attention_sinks": True, "output_gate": "elementwise"},
    "dots3_note": {
        "latent_norm_eps": "rms_norm_eps", "k_rope_norm": True, "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True, "output_gate": "head",
    },
}  # fmt: skip
for _name in ("dots3_note", "glm5_next", "mistral_large4"):  # as they are called inside a VLM
    _FAMILIES[f"{_name}_text"] = _FAMILIES[_name]

# What Sarvam's code takes where rope_scaling is null.
_SARVAM_YARN = {
    "rope_type": "deepseek_yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

# Families whose every full layer is sparse, also where the config leaves index_topk out.
_SPARSE = (
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "glm5_next", "glm5_next_text", "dots3_note",
    "dots3_note_text", "mistral_large4", "mistral_large4_text",
)  # fmt: skip

# Known families that need what this layer does not do.
_REFUSED = {
    "deepseek_v4": "shared-KV attention with compressed context, which is not MLA",
    "gigachat3_5": "gated norms on the latents",
    "motif3": "differential heads",
    "pangu_v2_moe": "sparse attention with learned sinks",
    "vaetki": "norms that multiply by 1 + weight",
}

_RENAMED = {  # openPangu, LongCat, Kimi-Linear and the layers of a vision-language model
    "attention_q_lora_dim": "q_lora_rank",
    "attention_kv_lora_dim": "kv_lora_rank",
    "attention_qk_dim": "qk_nope_head_dim",
    "attention_qk_rope_dim": "qk_rope_head_dim",
    "attention_v_dim": "v_head_dim",
    "num_layers": "num_hidden_layers",
    "model_max_length": "max_position_embeddings",
    "mla_use_output_gate": "output_gate",
    "gated_attention_proj_granularity_type": "output_gate",
}
_GATES = {True: "elementwise", False: None, "head_wise": "head", "element_wise": "elementwise"}
# Keys of `rope_parameters` that say what other keys say, or that are read below.
_ROPE_ASIDE = ("rope_theta", "partial_rotary_factor", "max_position_embeddings",
               "llama_4_scaling_beta")  # fmt: skip


def read_json(path: pathlib.Path) -> Mapping[str, Any]:
    """The object that a JSON file holds; ValueError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def read_config(config: Mapping[str, Any] | str | os.PathLike) -> tuple[Mapping[str, Any], str]:
    """The JSON object of a config, and what to call it in an error.

    Args:
        config: the object itself, its file, or a folder with config.json or params.json.

    Raises:
        ValueError: not JSON, or not an object.
        FileNotFoundError: nothing there.
    """
    if isinstance(config, Mapping):
        return config, "config"
    path = pathlib.Path(config)
    if path.is_dir():
        names = ("config.json", "params.json")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither config.json nor params.json.")
        path = found[0]
    return read_json(path), str(path)


def language_model(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model, of a vision-language model too."""
    for key in ("text_config", "language_config", "llm_config"):
        inner = hf.get(key)
        if isinstance(inner, Mapping) and "kv_lora_rank" not in hf:
            return {"model_type": hf.get("model_type")} | {
                k: v for k, v in inner.items() if k != "model_type" or v is not None
            }
    return _from_mistral(hf) if "n_heads" in hf and "dim" in hf else hf


def attention_fields(hf: Mapping[str, Any], where: str, layer: int | None = None) -> dict[str, Any]:
    """Fields of `MLAConfig` from a config.json.

    Args:
        hf: the config.
        where: what to call it in an error.
        layer: which layer, where they differ.

    Raises:
        ValueError: a key asks for what is not supported, or has an impossible value.
    """
    hf = dict(language_model(hf))
    family = hf.get("model_type")
    if family is not None and (not isinstance(family, str) or family not in _FAMILIES):
        reason = _REFUSED.get(str(family))
        if reason is not None:
            raise ValueError(f"{where}: model_type={family!r} needs {reason}: not supported.")
        raise ValueError(
            f"{where}: model_type={family!r} is not a family that this layer knows to be right "
            f"for; known: {sorted(_FAMILIES)}. Build MLAConfig(...) from its fields instead."
        )
    for theirs, ours in _RENAMED.items():
        if hf.get(theirs) is not None and hf.get(ours) is None:
            value = hf[theirs]
            gate = ours == "output_gate" and isinstance(value, bool | str)
            hf[ours] = _GATES.get(value, value) if gate else value
    if str(family).startswith("longcat") and hf.get("num_layers") is not None:
        hf["num_hidden_layers"] = hf["num_layers"]  # transformers counts the attentions instead
    if family in ("dots3_note", "dots3_note_text"):
        hf = _dots3_layer(hf, where, layer)
    if family in ("mistral_large4", "mistral_large4_text"):
        hf = _mistral_large4_layer(hf, where, layer)
    if family == "sarvam_mla" and hf.get("rope_parameters") is None:
        hf["rope_scaling"] = hf.get("rope_scaling") or _SARVAM_YARN
    if "qk_latent_layernorm" in hf:  # TransMLA, whose biases are not DeepSeek's
        hf["latent_norm"] = hf["qk_latent_layernorm"]
        if hf.get("attention_bias") is True:
            query = "q_proj" if hf.get("q_lora_rank") is None else "q_b_proj"
            hf["attention_bias"] = (query, "kv_a_proj")
    _refuse(hf, family, where)
    fields = dict(_FAMILIES[family]) if family is not None else {}
    if fields.get("latent_norm_eps") == "rms_norm_eps":
        fields["latent_norm_eps"] = hf.get("rms_norm_eps", 1e-5)
    if family == "bailing_hybrid" and "V2_5" in str(hf.get("architectures")):
        fields["output_gate"] = None  # Ling and Ring 2.5 share the name with Ling 3
    names = {field.name for field in dataclasses.fields(MLAConfig)} - {"rope_scaling"}
    fields |= {key: value for key, value in hf.items() if key in names and value is not None}
    if "q_lora_rank" in hf:
        fields["q_lora_rank"] = hf["q_lora_rank"]  # null: queries are projected directly
    if hf.get("mla_use_output_gate") is False:
        fields["output_gate"] = None
    if hf.get("use_sliding_window") is False:
        fields["sliding_window"] = None
    fields |= _rope_fields(hf, where)
    if family == "minicpm3" and hf.get("v_head_dim") is None:
        width, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
        if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
            raise ValueError(f"{where} lacks hidden_size or num_attention_heads.")
        fields["v_head_dim"] = width // heads
    if hf.get("use_mla_nope"):  # SGLang's Ling: no rotary channels at all
        fields["qk_rope_head_dim"] = 0
    return fields


def _refuse(hf: Mapping[str, Any], family: str | None, where: str) -> None:
    """Raises where a key asks for attention that the layer does not compute."""
    sparse = hf.get("index_topk", 2048 if family in _SPARSE else None)
    kinds = hf.get("layer_types")
    dense = isinstance(kinds, Sequence) and set(map(str, kinds)) == {"full_attention"}
    if sparse and not (dense and family in _SPARSE):
        raise ValueError(f"{where}: index_topk={sparse!r}: sparse attention is not supported yet.")
    sources = hf.get("kv_source_layers")
    if sources is not None and (
        not isinstance(sources, list) or sources != list(range(len(sources)))
    ):
        raise ValueError(
            f"{where}: kv_source_layers={sources!r}: attention to another layer's cache is not "
            "supported yet."
        )
    cap = hf.get("attn_logit_softcapping")
    if cap is not None:
        raise ValueError(f"{where}: attn_logit_softcapping={cap!r}: capped logits: not supported.")
    for key, value, what in (
        ("use_mla", False, "ordinary attention, without latents"),
        ("use_output_subspace", True, "an output latent"),
        ("use_qkv_bias", True, "biases that DeepSeek's code does not have"),
    ):
        if hf.get(key) is value:
            raise ValueError(f"{where}: {key}={value!r} asks for {what}: not supported.")
    if family == "kimi_linear" and hf.get("mla_use_nope") is False:
        raise ValueError(
            f"{where}: mla_use_nope=False: no implementation of {family} rotates; it must be true."
        )


def _rope_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta, rope_scaling and the query scale that Mistral keeps beside them."""
    key = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    parameters, fields = hf.get(key), {}
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}: {key}={parameters!r} must be an object or null.")
        if parameters.get("rope_theta") is not None:
            fields["rope_theta"] = parameters["rope_theta"]
        if parameters.get("llama_4_scaling_beta") is not None:
            fields["llama_4_scaling_beta"] = parameters["llama_4_scaling_beta"]
            original = parameters.get("original_max_position_embeddings")
            fields["llama_4_original_max_position_embeddings"] = original
        kept = {k: v for k, v in parameters.items() if k not in _ROPE_ASIDE}
        try:
            fields["rope_scaling"] = RopeScaling.from_mapping(kept)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    scaling = hf.get("llama_4_scaling")
    if isinstance(scaling, Mapping):
        fields["llama_4_scaling_beta"] = scaling.get("beta")
        original = scaling.get("original_max_position_embeddings")
        fields["llama_4_original_max_position_embeddings"] = original
    return fields


def _from_mistral(params: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's params.json under Hugging Face's keys."""
    names = {
        "dim": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
        "norm_eps": "rms_norm_eps",
    }  # fmt: skip
    hf = {names.get(key, key): value for key, value in params.items()}
    yarn = hf.pop("yarn", None)
    if isinstance(yarn, Mapping):
        hf["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn.get("factor"),
            "original_max_position_embeddings": yarn.get("original_max_position_embeddings"),
            "beta_fast": yarn.get("beta"),
            "beta_slow": yarn.get("alpha"),
        } | (
            {"mscale": 1.0, "mscale_all_dim": 1.0}
            if yarn.get("apply_scale", True)
            else {"attention_factor": 1.0}
        )
    return hf


def _dots3_layer(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """dots3: sliding layers have widths and a rotary base of their own; the others are sparse."""
    hf = dict(hf)
    canonical = hf.get("per_layer_config") is not None
    kinds = hf.get("layer_types")
    sparse = hf.get("use_dsa", None if canonical else True)
    if kinds is None:
        full = "full_attention" if sparse is False else "indexed_attention"
        sliding = hf.get("use_sliding_window", True)
        kinds = [
            "sliding_attention" if sliding and i >= 2 and i % 4 != 1 else full
            for i in range(_count(hf, where))
        ]
    elif sparse is not None and isinstance(kinds, list):
        renamed = ("full_attention", "indexed_attention")[:: 1 if sparse else -1]
        kinds = [renamed[1] if kind == renamed[0] else kind for kind in kinds]
    kind = _one_of(kinds, where, layer, "layer_types")
    hf["layer_types"] = [kind]
    window = hf.pop("sliding_window", None) or hf.pop("sliding_window_size", None) or 512
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling")
    if isinstance(parameters, Mapping):
        own = [value for key, value in parameters.items() if key == kind]
        if own and isinstance(own[0], Mapping):
            hf["rope_parameters"] = own[0]
    if kind != "sliding_attention":
        hf.setdefault("rope_theta", 80_000_000.0)
        return hf
    hf["sliding_window"], hf["index_topk"] = window, None
    if canonical:
        own = hf["per_layer_config"]
        index = 0 if layer is None else layer  # all alike where None
        own = own.get(str(index), own.get(index)) if isinstance(own, Mapping) else None
        if not isinstance(own, Mapping):
            raise ValueError(f"{where}: per_layer_config lacks the sliding layer {index}.")
        hf |= own
    else:
        widths = {
            "num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024,
            "qk_nope_head_dim": 192, "v_head_dim": 128, "head_dim": 256,
        }  # fmt: skip
        hf |= {name: hf.get(f"swa_{name}", default) for name, default in widths.items()}
        if hf.get("swa_qk_rope_head_dim") is not None:
            hf["qk_rope_head_dim"] = hf["swa_qk_rope_head_dim"]
        elif isinstance(hf["head_dim"], int) and isinstance(hf["qk_nope_head_dim"], int):
            hf["qk_rope_head_dim"] = hf["head_dim"] - hf["qk_nope_head_dim"]
        hf["rope_theta"] = hf.get("swa_rope_theta", 50_000.0)
    return hf


def _mistral_large4_layer(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    """Mistral Large 4: layers without rotation have no rotary channels, only wider others."""
    rotated = hf.get("no_rope_layers")  # 1 where the layer does rotate
    if rotated is None:
        every = hf.get("no_rope_layer_interval", 4)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"{where}: no_rope_layer_interval={every!r} must be at least 1.")
        rotated = [int((i + 1) % every != 0) for i in range(_count(hf, where))]
    if _one_of(rotated, where, layer, "no_rope_layers"):
        return hf
    nope, rope = hf.get("qk_nope_head_dim"), hf.get("qk_rope_head_dim")
    if not (isinstance(nope, int) and isinstance(rope, int)):
        raise ValueError(f"{where} lacks qk_nope_head_dim or qk_rope_head_dim.")
    # The temperature stays that of the rotated layers, which YaRN may have changed.
    return dict(hf) | {"qk_nope_head_dim": nope + rope, "qk_rope_head_dim": 0}


def _count(hf: Mapping[str, Any], where: str) -> int:
    count = hf.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 10_000:
        raise ValueError(f"{where}: num_hidden_layers={count!r} must be a positive whole number.")
    return count


def _one_of(kinds: Any, where: str, layer: int | None, key: str) -> Any:
    """The entry of `layer`, or the only one there is."""
    if not isinstance(kinds, Sequence) or isinstance(kinds, str) or not kinds:
        raise ValueError(f"{where}: {key}={kinds!r} must be a list with an entry per layer.")
    if layer is not None:
        if not 0 <= layer < len(kinds):
            raise ValueError(f"{where}: layer={layer}: there are layers 0 to {len(kinds) - 1}.")
        return kinds[layer]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{where}: {key}: the model's layers differ: give layer=.")
    return kinds[0]
