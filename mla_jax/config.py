"""The shape of one MLA layer: which widths, which rotary embedding, which scale factors.

Keys are those of the Hugging Face config.json, verbatim, so that a checkpoint's config reads as
documentation of this one. A config is data: frozen, hashable, and validated where it is made.

Letters: N num_attention_heads, D hidden_size, Q q_lora_rank, R kv_lora_rank, H qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim.
"""

import dataclasses
import difflib
import importlib.resources
import json
import math
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, Self

_YARN = ("yarn", "deepseek_yarn")  # two names of the same formula
_ROPE_TYPES = (*_YARN, "longrope", "linear")


def _check(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: {key} must be {allowed}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(given: Mapping[str, Any], cls: type, where: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where} has the unknown key {key!r}.{hint} Known: {known}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length a model was trained on.

    Attributes:
        rope_type: "yarn" (also called "deepseek_yarn"; Peng et al. 2023, arXiv 2309.00071),
            "longrope" (Ding et al. 2024, arXiv 2402.13753) or "linear".
        factor: context extension factor. Under longrope it may be left out and is then
            max_position_embeddings / original_max_position_embeddings.
        original_max_position_embeddings: context length before the extension, in tokens.
        beta_fast: YaRN, rotations within the original context above which a channel is kept.
        beta_slow: YaRN, rotations below which a channel is fully interpolated.
        mscale: YaRN, weight of log(factor) in the factor on cos and sin (numerator).
        mscale_all_dim: YaRN, the same in the softmax temperature, and the denominator of the
            factor on cos and sin.
        attention_factor: the factor on cos and sin, given outright.
        truncate: YaRN, round the correction range to whole channels, as Hugging Face does.
        short_factor: longrope, P/2 divisors of the frequencies up to the original length.
        long_factor: longrope, P/2 divisors used where max_position_embeddings exceeds it.
    """

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        prefix = "rope_scaling."
        _check(
            self.rope_type in _ROPE_TYPES,
            prefix + "rope_type",
            self.rope_type,
            f"one of {_ROPE_TYPES}",
        )
        for key in ("short_factor", "long_factor"):
            value = getattr(self, key)
            if value is not None:
                _check(
                    isinstance(value, list | tuple) and all(_is_number(v) and v > 0 for v in value),
                    prefix + key,
                    value,
                    "a list of positive numbers",
                )
                object.__setattr__(self, key, tuple(float(v) for v in value))
        for key in ("beta_fast", "beta_slow", "attention_factor", "factor"):
            value = getattr(self, key)
            if value is not None:
                _check(_is_number(value) and value > 0, prefix + key, value, "a positive number")
        for key in ("mscale", "mscale_all_dim"):
            value = getattr(self, key)
            if value is not None:
                _check(_is_number(value) and value >= 0, prefix + key, value, "a number >= 0")
        original = self.original_max_position_embeddings
        if original is not None or self.rope_type != "linear":
            _check(
                isinstance(original, int) and _is_int(original) and original > 0,
                prefix + "original_max_position_embeddings",
                original,
                "a positive whole number of tokens",
            )
        _check(isinstance(self.truncate, bool), prefix + "truncate", self.truncate, "true or false")
        if self.rope_type != "longrope":
            _check(self.factor is not None, prefix + "factor", self.factor, "a positive number")
        else:
            for key in ("short_factor", "long_factor"):
                _check(getattr(self, key) is not None, prefix + key, None, "a list of P/2 numbers")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RopeScaling | None":
        """Reads `rope_scaling` (hub) or `rope_parameters` (transformers 5); None for "default"."""
        keys = dict(mapping)
        rope_type = keys.pop("rope_type", None) or keys.pop("type", None)
        keys.pop("type", None)
        keys.pop("rope_theta", None)
        if rope_type in (None, "default"):
            return None
        given = {key: value for key, value in keys.items() if value is not None}
        _check_keys(given, cls, "rope_scaling")
        return cls(rope_type=rope_type, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Configuration of one Multi-head Latent Attention layer.

    Attributes:
        hidden_size: D, width of the residual stream.
        num_attention_heads: N, query heads.
        q_lora_rank: Q, width of the query latent; None projects queries directly, with no norm.
        kv_lora_rank: R, width of the latent that the cache holds, one per token.
        qk_nope_head_dim: H, per-head query and key channels without position.
        qk_rope_head_dim: P, rotary channels, one key shared by all heads; even, may be 0.
        v_head_dim: V, per-head value channels.
        num_hidden_layers: layers of the whole model; only `costs` uses it.
        max_position_embeddings: longest context of the model, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: a `RopeScaling`, a mapping of its fields, or None.
        rope_interleave: whether the stored weights rotate channel pairs (0,1), (2,3), ...
            (DeepSeek, Kimi, GLM) rather than (i, i + P/2) (MiniCPM3).
        mla_use_nope: the P channels exist and are cached but never rotated (Kimi-Linear).
        attention_bias: biases on q_a_proj, kv_a_proj and o_proj.
        latent_norm_eps: epsilon of the RMSNorms on both latents. Not the model's rms_norm_eps:
            the reference code of every family here leaves it at 1e-6.
        mla_scale_q_lora: multiply queries by sqrt(D/Q) (LongCat).
        mla_scale_kv_lora: multiply latents by sqrt(D/R) before they are cached (LongCat).
        softmax_scale: overrides the softmax temperature that `scale` would derive.

    Raises:
        ValueError: a field has a value it cannot have; the message names the key and what may be.

    >>> config = MLAConfig.from_preset("deepseek_v3")
    >>> config.kv_lora_rank, config.qk_rope_head_dim, round(config.scale, 6)
    (512, 64, 0.135234)
    """

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_hidden_layers: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    mla_use_nope: bool = False
    attention_bias: bool = False
    latent_norm_eps: float = 1e-6
    mla_scale_q_lora: bool = False
    mla_scale_kv_lora: bool = False
    softmax_scale: float | None = None

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_mapping(self.rope_scaling))
        for key in (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "v_head_dim",
            "num_hidden_layers",
            "max_position_embeddings",
        ):
            value = getattr(self, key)
            _check(_is_int(value) and value > 0, key, value, "a positive whole number")
        for key in ("qk_nope_head_dim", "qk_rope_head_dim"):
            value = getattr(self, key)
            _check(_is_int(value) and value >= 0, key, value, "a whole number >= 0")
        _check(
            self.q_lora_rank is None or (_is_int(self.q_lora_rank) and self.q_lora_rank > 0),
            "q_lora_rank",
            self.q_lora_rank,
            "a positive whole number or None",
        )
        _check(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "even: rotary channels turn in pairs",
        )
        _check(
            self.qk_head_dim > 0,
            "qk_nope_head_dim",
            self.qk_nope_head_dim,
            "positive where qk_rope_head_dim is 0",
        )
        for key in (
            "rope_interleave",
            "mla_use_nope",
            "attention_bias",
            "mla_scale_q_lora",
            "mla_scale_kv_lora",
        ):
            value = getattr(self, key)
            _check(isinstance(value, bool), key, value, "True or False")
        for key in ("rope_theta", "latent_norm_eps", "softmax_scale"):
            value = getattr(self, key)
            if value is None and key == "softmax_scale":
                continue
            _check(_is_number(value) and value > 0, key, value, "a positive number")
            object.__setattr__(self, key, float(value))
        _check(
            self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
            "rope_scaling",
            self.rope_scaling,
            "a RopeScaling, a mapping or None",
        )
        _check(
            not (self.mla_scale_q_lora and self.q_lora_rank is None),
            "mla_scale_q_lora",
            True,
            "False where q_lora_rank is None",
        )
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "longrope":
            for key in ("short_factor", "long_factor"):
                value = getattr(scaling, key)
                _check(
                    len(value) == self.qk_rope_head_dim // 2,
                    f"rope_scaling.{key}",
                    value,
                    f"of length qk_rope_head_dim / 2 = {self.qk_rope_head_dim // 2}",
                )

    @property
    def qk_head_dim(self) -> int:
        """H + P, the width of a query and of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """Softmax temperature: (H+P)^-0.5, times m^2 under YaRN: m = 0.1 mscale_all_dim ln f + 1.

        YaRN (arXiv 2309.00071) eq. 15 as DeepSeek-V2's code applies it. It does not depend on the
        form: in the absorbed form scores are the same numbers, made from R+P channels.
        """
        if self.softmax_scale is not None:
            return self.softmax_scale
        scale = self.qk_head_dim**-0.5
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type not in _YARN or self.mla_use_nope:
            return scale
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim or 0.0) ** 2

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        _check_keys(changes, type(self), "replace()")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The config of a released model, one of `presets()`."""
        if name not in presets():
            close = difflib.get_close_matches(str(name), presets(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown preset {name!r}.{hint} Presets: {', '.join(presets())}.")
        return cls.from_toml(configs_dir() / "models" / f"{name}.toml")

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> Self:
        """Reads a TOML file that holds the fields of this class, `rope_scaling` as a table."""
        path = pathlib.Path(path)
        try:
            keys = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
        keys.setdefault("q_lora_rank", None)  # TOML cannot say null
        return cls._from_mapping(keys, str(path))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike) -> Self:
        """Reads a Hugging Face config.json: a mapping, the file, or the folder that holds it.

        Both styles are read: `rope_theta` with `rope_scaling` (the hub's files) and
        `rope_parameters` (transformers 5). Keys that do not shape attention are left alone; one
        that asks for attention which this layer does not compute is refused.

        Raises:
            ValueError: a needed key is missing, a value is impossible, or the model needs a
                variation that is not supported; the message names the key.
        """
        where = "config"
        if not isinstance(config, Mapping):
            path = pathlib.Path(config)
            path = path / "config.json" if path.is_dir() else path
            where = str(path)
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, Mapping):
            raise ValueError(f"{where} holds a {type(config).__name__}, not a JSON object.")
        return cls._from_mapping(_hf_fields(config, where), where)

    @classmethod
    def _from_mapping(cls, keys: Mapping[str, Any], where: str) -> Self:
        _check_keys(keys, cls, where)
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in keys
        ]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}.")
        try:
            return cls(**keys)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def yarn_mscale(factor: float | None, weight: float) -> float:
    """YaRN's 0.1 weight ln(factor) + 1 for factor > 1 (arXiv 2309.00071, eq. 15)."""
    return 1.0 if factor is None or factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


# What a family's code does where its config.json says nothing.
_HF_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "kimi_k2": {},
    "glm4_moe_lite": {},
    "youtu": {},
    "kimi_linear": {"mla_use_nope": True},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "minicpm3": {"rope_interleave": False},
}

# Keys that change the attention itself, and what they ask for.
_HF_UNSUPPORTED = {
    "index_topk": "sparse attention (a lightning indexer)",
    "sliding_window": "sliding-window attention",
    "use_output_gate": "an output gate",
}


def _hf_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of MLAConfig from the keys of a Hugging Face config."""
    if "kv_lora_rank" not in hf and isinstance(hf.get("text_config"), Mapping):
        hf = hf["text_config"]  # a vision-language model nests its language model
    for key, what in _HF_UNSUPPORTED.items():
        if hf.get(key):
            raise ValueError(f"{where}: {key}={hf[key]!r} asks for {what}: not supported yet.")
    family = hf.get("model_type")
    if family is not None and family not in _HF_FAMILIES:
        raise ValueError(
            f"{where}: model_type={family!r} is not a family that this layer knows to be right "
            f"for; known: {sorted(_HF_FAMILIES)}. Build MLAConfig(...) from its fields instead."
        )
    fields = dict(_HF_FAMILIES.get(family or "", {}))
    names = {field.name for field in dataclasses.fields(MLAConfig)} - {"rope_scaling"}
    fields |= {key: value for key, value in hf.items() if key in names and value is not None}
    if "q_lora_rank" in hf:
        fields["q_lora_rank"] = hf["q_lora_rank"]  # null: queries are projected directly
    parameters = hf.get("rope_parameters")
    if parameters is None:
        parameters = hf.get("rope_scaling")
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}: rope_scaling={parameters!r} must be an object or null.")
        if "rope_theta" in parameters:
            fields["rope_theta"] = parameters["rope_theta"]
        fields["rope_scaling"] = RopeScaling.from_mapping(parameters)
    if family == "minicpm3" and hf.get("v_head_dim") is None:
        if not (_is_int(hf.get("hidden_size")) and _is_int(hf.get("num_attention_heads"))):
            raise ValueError(f"{where} lacks hidden_size or num_attention_heads.")
        fields["v_head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    return fields


def configs_dir() -> pathlib.Path:
    """The folder `configs/`: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(str(importlib.resources.files("mla_jax")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "models").is_dir():
            return folder
    raise FileNotFoundError(f"no configs/ with presets in {package} or beside it.")


def presets() -> tuple[str, ...]:
    """Names that `MLAConfig.from_preset` knows."""
    return tuple(sorted(path.stem for path in (configs_dir() / "models").glob("*.toml")))
