"""Families of models: what a config.json says, and what only the family's code says.

Each file holds `FAMILIES`, one `Family` each; `register` adds another. Everything that is asked of
a checkpoint's family is asked here: the fields of `MLAConfig` and of `DecoderConfig`, tensors'
names, what is refused and why, and the config.json of a saved model.
"""

from collections.abc import Mapping
from typing import Any

from mla_jax.families import (
    axk,
    deepseek,
    dots,
    glm,
    hunyuan,
    kimi,
    ling,
    longcat,
    minicpm,
    mistral,
    others,
    reading,
    sarvam,
    youtu,
)  # fmt: skip
from mla_jax.families import decoder as decoders
from mla_jax.families.family import Family as Family
from mla_jax.families.reading import language_model as language_model
from mla_jax.families.reading import read_config as read_config
from mla_jax.families.reading import read_json as read_json
from mla_jax.families.reading import resolve as resolve

FAMILIES: dict[str, Family] = {}  # by model_type
_GENERIC = Family(model_types=())  # where a config names none


def register(family: Family) -> None:
    """Adds a family: its configs are read, and its checkpoints loaded, from then on.

    Raises:
        ValueError: another family has one of its names.

    >>> register(Family(model_types=("deepseek_v3",)))
    Traceback (most recent call last):
    ValueError: model_type='deepseek_v3' is known already.
    """
    for name in family.model_types:
        if name in FAMILIES:
            raise ValueError(f"model_type={name!r} is known already.")
    FAMILIES.update(dict.fromkeys(family.model_types, family))


for _file in (axk, deepseek, dots, glm, hunyuan, kimi, ling, longcat, minicpm, mistral, others,
              sarvam, youtu):  # fmt: skip
    for _family in _file.FAMILIES:
        register(_family)


def find(model_type: Any, where: str = "config") -> Family | None:
    """The family of a config's `model_type`; None where it has none.

    Raises:
        ValueError: a family that is not known, or one that cannot be computed.

    >>> find("youtu").model_types
    ('youtu', 'youtu_llm')
    """
    if model_type is None:
        return None
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = sorted(name for name, each in FAMILIES.items() if each.refused is None)
        raise ValueError(
            f"{where}: model_type={model_type!r} is not a family that this layer knows to be right "
            f"for; known: {known}. Build MLAConfig(...) from its fields instead, or "
            "families.register a Family."
        )
    if family.refused is not None:
        raise ValueError(
            f"{where}: model_type={model_type!r} needs {family.refused}: not supported."
        )
    return family


def attention_fields(hf: Mapping[str, Any], where: str, layer: int | None = None) -> dict[str, Any]:
    """Fields of `MLAConfig` from a config.json.

    Args:
        hf: the config.
        where: what to call it in an error.
        layer: which layer, where they differ.

    Raises:
        ValueError: a key asks for what is not supported, or has an impossible value.

    >>> attention_fields({"model_type": "kimi_k2", "num_attention_heads": 64}, "config")[
    ...     "num_attention_heads"]
    64
    """
    hf = language_model(hf)
    family = find(hf.get("model_type"), where)
    return reading.attention_fields(reading.complete(hf, family, where, layer), where)


def decoder_fields(hf: Mapping[str, Any], attention: Any, where: str) -> dict[str, Any]:
    """Fields of `DecoderConfig`, without its `attention`, from a config.json.

    Args:
        hf: the config.
        attention: its `MLAConfig`.
        where: what to call it in an error.

    Raises:
        ValueError: a family whose decoder has another shape, or a key that asks for what the
            decoder does not do.
    """
    hf = language_model(hf)
    model_type = hf.get("model_type")
    family = find(model_type, where)
    if family is not None and family.decoder is None:
        fitting = ", ".join(name for name, each in FAMILIES.items() if each.decoder is not None)
        reason = family.no_decoder or f"this decoder has the shape of {fitting}"
        raise ValueError(
            f"{where}: model_type={model_type!r}: {reason}; its attention layers load into "
            "MultiHeadLatentAttention."
        )
    hf = reading.complete(hf, family, where)
    if family is None or family.decoder is None:
        fields = decoders.mixture(hf, where, scoring="softmax")
    else:
        fields = family.decoder(hf, attention, where)
    fields["eos_token_ids"] = decoders.stop_tokens(hf.get("eos_token_id"))
    return fields | {"model_type": model_type}


def config_json(config: Any, dtype: str) -> dict[str, Any]:
    """The config.json of a `DecoderConfig`, as its family's own code and `from_hf` read it.

    A config of no family becomes DeepSeek-V2's or V3's, by how its router scores, V3.2's or GLM-5's
    with sparse attention, LongCat's with its layers. Fields that the
    family's code does not know (softmax_scale, mla_scale_q_lora and the like) stand there by their
    own names: only this package reads them.

    Args:
        config: the `DecoderConfig`.
        dtype: of the parameters.

    Raises:
        ValueError: a model_type that is not known.

    >>> from mla_jax.models import DecoderConfig
    >>> written = config_json(DecoderConfig.from_preset("moonlight"), "bfloat16")
    >>> written["model_type"], written["n_routed_experts"]
    ('deepseek_v3', 64)
    """
    name = config.model_type
    if name is None:
        softmax = config.n_routed_experts is not None and config.scoring_func == "softmax"
        name = "deepseek_v2" if softmax else "deepseek_v3"
        if config.shortcut:
            name = "longcat_flash"
        elif config.attention.index_topk is not None:
            name = "glm_moe_dsa" if config.indexer_types is not None else "deepseek_v32"
    family = find(name)
    assert family is not None
    if family.saved_as is not None:
        name, family = family.saved_as, FAMILIES[family.saved_as]
    hf = decoders.written(config, name, dtype)
    if "index_topk" in family.defaults:
        hf["index_topk"] = config.attention.index_topk
    if family.architecture is not None:
        hf = {"architectures": [family.architecture]} | hf
    return hf if family.written is None else family.written(config, hf)


def of_checkpoint(hf: Mapping[str, Any], where: str) -> tuple[Family, Family]:
    """The families of a checkpoint's language model and of the whole, by its config.json.

    They differ where a vision-language model nests the config of another family.
    """
    inner = find(language_model(hf).get("model_type"), where) or _GENERIC
    outer = hf.get("model_type")
    return inner, FAMILIES.get(outer, inner) if isinstance(outer, str) else inner


def styles() -> dict[str, Mapping[str, str]]:
    """Names of attention tensors by style: Hugging Face's of DeepSeek's to the style's.

    >>> styles()["bailing"]
    {'o_proj': 'dense'}
    """
    found: dict[str, Mapping[str, str]] = {"huggingface": {}}
    for family in FAMILIES.values():
        found |= family.styles
    return found
