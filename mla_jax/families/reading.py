"""Reads a config.json: which file, which part of it, which family, which fields of `MLAConfig`.

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
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.config import MLAConfig, RopeScaling
from mla_jax.families.decoder import stop_tokens
from mla_jax.families.family import Family

# How a gate's kinds are called, by key and value.
_GATES = {True: "elementwise", False: None, "head_wise": "head", "element_wise": "elementwise"}
# Keys that any family's config may have.
_RENAMED = {
    "mla_use_output_gate": "output_gate", "gated_attention_proj_granularity_type": "output_gate",
}  # fmt: skip
# Keys of `rope_parameters` that say what other keys say, or that are read below.
_ROPE_ASIDE = ("rope_theta", "partial_rotary_factor", "max_position_embeddings",
               "llama_4_scaling_beta")  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("*.json", "*.model", "*.jinja")  # configs, vocabularies, chat templates


def resolve(path_or_repo_id: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """The local folder or file that a path or a repo id of the Hugging Face hub means.

    What exists is a path. Otherwise "owner/name" is a repository, which is fetched into the hub's
    cache where `huggingface_hub` is installed: its JSON files, its tokenizer's files and its chat
    template, and with `weights` its safetensors.

    Raises:
        FileNotFoundError: neither; or a repository that cannot be fetched.

    >>> resolve("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere is neither a file nor a folder.
    """
    local = pathlib.Path(path_or_repo_id)
    if local.exists():
        return local
    name = os.fspath(path_or_repo_id)
    if _REPOSITORY.fullmatch(name) is None:
        raise FileNotFoundError(f"{name} is neither a file nor a folder.")
    try:
        from huggingface_hub import snapshot_download  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder; to fetch a repository of that name from the "
            "Hugging Face hub, install huggingface_hub."
        ) from error
    patterns = [*_SMALL, "*.safetensors"] if weights else [*_SMALL]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # of many lines, such as the network's
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder, nor could it be fetched: {first}"
        ) from error


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
        config: the object itself, its file, a folder with config.json or params.json, or a repo id
            (see `resolve`).

    Raises:
        ValueError: not JSON, or not an object.
        FileNotFoundError: nothing there.
    """
    if isinstance(config, Mapping):
        return config, "config"
    path = resolve(config, weights=False)
    if path.is_dir():
        names = ("config.json", "params.json")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither config.json nor params.json.")
        path = found[0]
    return read_json(path), str(path)


def language_model(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model, of a vision-language model too.

    What stands beside that part counts where the part says nothing; stop tokens count together.
    """
    for key in ("text_config", "language_config", "llm_config"):
        inner = hf.get(key)
        if not isinstance(inner, Mapping) or "kv_lora_rank" in hf:
            continue
        found = dict(inner)
        for name in ("model_type", "quantization_config", "tie_word_embeddings"):
            if found.get(name) is None and hf.get(name) is not None:
                found[name] = hf[name]
        if hf.get("eos_token_id") is not None:
            stop = (*stop_tokens(found.get("eos_token_id")), *stop_tokens(hf["eos_token_id"]))
            found["eos_token_id"] = [t for i, t in enumerate(stop) if t not in stop[:i]]
        return found
    return _from_mistral(hf) if "n_heads" in hf and "dim" in hf else hf


def complete(
    hf: Mapping[str, Any], family: Family | None, where: str, layer: int | None = None
) -> dict[str, Any]:
    """A language model's config in DeepSeek's keys, with all that its family adds."""
    hf = dict(hf)
    for theirs, ours in (_RENAMED | dict(family.renamed if family else {})).items():
        if hf.get(theirs) is not None and hf.get(ours) is None:
            value = hf[theirs]
            gate = ours == "output_gate" and isinstance(value, bool | str)
            hf[ours] = _GATES.get(value, value) if gate else value
    if family is not None:
        hf = {**family.defaults, **hf}
        if family.adjust is not None:
            hf = family.adjust(hf, where, layer)
    _refuse(hf, family, where)
    return hf


def attention_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `MLAConfig` from a config that is `complete`.

    Raises:
        ValueError: a key has an impossible value.
    """
    names = {field.name for field in dataclasses.fields(MLAConfig)} - {"rope_scaling"}
    fields = {key: value for key, value in hf.items() if key in names and value is not None}
    if "q_lora_rank" in hf:
        fields["q_lora_rank"] = hf["q_lora_rank"]  # null: queries are projected directly
    if hf.get("use_sliding_window") is False:
        fields["sliding_window"] = None
    if hf.get("use_mla_nope"):  # SGLang's Ling: no rotary channels at all
        fields["qk_rope_head_dim"] = 0
    if not fields.get("index_topk") or _attends_to_all(hf):
        fields = {key: value for key, value in fields.items() if not key.startswith("index")}
    return fields | _rope_fields(hf, where)


def _attends_to_all(hf: Mapping[str, Any]) -> bool:
    """Whether a config of a sparse family says that its layers attend to all tokens."""
    kinds = hf.get("layer_types")
    return isinstance(kinds, Sequence) and set(map(str, kinds)) == {"full_attention"}


def _refuse(hf: Mapping[str, Any], family: Family | None, where: str) -> None:
    """Raises where a key asks for attention that the layer does not compute."""
    sparse = hf.get("index_topk")
    if sparse and not (family is not None and "index_n_heads" in family.defaults):
        raise ValueError(
            f"{where}: index_topk={sparse!r}: model_type={hf.get('model_type')!r} is not known to "
            "have an indexer; deepseek_v32 is DeepSeek-V3 with one."
        )
    sources, shared = hf.get("kv_source_layers"), "kv_source_layers"
    own = sources is None or (isinstance(sources, list) and sources == list(range(len(sources))))
    if not own and not (family is not None and shared in family.defaults):
        raise ValueError(
            f"{where}: kv_source_layers={sources!r}: model_type={hf.get('model_type')!r} is not "
            "known to attend to another layer's cache."
        )
    cap = hf.get("attn_logit_softcapping")
    if cap is not None:
        raise ValueError(f"{where}: attn_logit_softcapping={cap!r}: capped logits: not supported.")
    refusals = {
        "use_mla": (False, "ordinary attention, without latents"),
        "use_output_subspace": (True, "an output latent"),
        "use_qkv_bias": (True, "biases that DeepSeek's code does not have"),
    }
    for key, (value, what) in refusals.items():
        if hf.get(key) is value:
            raise ValueError(f"{where}: {key}={value!r} asks for {what}: not supported.")
    for key, (value, why) in ({} if family is None else family.refusals).items():
        if hf.get(key) == value and key in hf:
            raise ValueError(f"{where}: {key}={value!r}: {why}.")


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
