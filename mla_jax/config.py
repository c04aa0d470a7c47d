"""The shape of one MLA layer: which widths, which rotary embedding, which scale factors.

Keys are those of the Hugging Face config.json, verbatim, so that a checkpoint's config reads as
documentation of this one. A config is data: frozen, hashable, and validated where it is made.

Letters: N num_attention_heads, D hidden_size, Q q_lora_rank, R kv_lora_rank, H qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim.
"""

import dataclasses
import difflib
import importlib.resources
import math
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, Self

YARN = ("yarn", "deepseek_yarn")  # two names of the same formula
_ROPE_TYPES = (*YARN, "longrope", "linear")
_PROJECTIONS = ("q_a_proj", "q_proj", "q_b_proj", "kv_a_proj", "o_proj")
_POSITIVE_INTEGERS = (
    "hidden_size", "num_attention_heads", "kv_lora_rank", "v_head_dim", "num_hidden_layers",
    "max_position_embeddings", "index_head_dim",
)  # fmt: skip
_OPTIONAL_INTEGERS = (
    "q_lora_rank", "num_mla_layers", "sliding_window", "llama_4_original_max_position_embeddings",
    "index_topk", "index_n_heads", "index_kpool",
)  # fmt: skip
_SWITCHES = (
    "rope_interleave", "mla_use_nope", "latent_norm", "k_rope_norm", "mla_scale_q_lora",
    "mla_scale_kv_lora", "attention_sinks", "query_scale_ssmax", "indexer_rope_interleave",
    "index_rope_last", "index_query_scale_ssmax", "index_kpool_always_select_tail",
)  # fmt: skip
# Releases that share another's shapes.
_PRESET_ALIASES = {
    "kimi_k2": "kimi_k2_0711",
    "deepseek_r1": "deepseek_v3",
    "deepseek_v3_1": "deepseek_v3",
}


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

    >>> RopeScaling(rope_type="linear", factor=4).factor
    4
    >>> RopeScaling(rope_type="linear")
    Traceback (most recent call last):
    ValueError: rope_scaling.factor=None: rope_scaling.factor must be a positive number.
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
        if rope_type is None and any(value is not None for value in keys.values()):
            raise ValueError(f"rope_scaling={dict(mapping)!r} lacks rope_type.")
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
        num_hidden_layers: layers of the whole model.
        num_mla_layers: how many of these attentions the whole model has, where that is not one in
            every layer: fewer in a hybrid (7 in Kimi-Linear's 27 layers), more where a layer has
            two (56 in LongCat-Flash's 28); None is one a layer. Only `costs` uses it.
        max_position_embeddings: longest context of the model, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: a `RopeScaling`, a mapping of its fields, or None.
        rope_interleave: whether the stored weights rotate channel pairs (0,1), (2,3), ...
            (DeepSeek, Kimi, GLM) rather than (i, i + P/2) (MiniCPM3, Hy4).
        rope_inv_freq: the P/2 inverse frequencies outright, such as a model's learned ones
            (Mistral Large 4's LeRoPE); None derives them from rope_theta and rope_scaling.
        mla_use_nope: the P channels exist and are cached but never rotated (Kimi-Linear).
        attention_bias: biases on q_a_proj, kv_a_proj and o_proj; or the names of the projections
            that have one (TransMLA: q_a_proj or q_proj, and kv_a_proj).
        latent_norm: RMSNorms on the query and key-value latents; False is TransMLA's.
        latent_norm_eps: epsilon of the RMSNorms on the latents. Not the model's rms_norm_eps:
            the reference code of most families leaves it at 1e-6.
        k_rope_norm: RMSNorm on the shared rotary key before it is rotated (dots3).
        mla_scale_q_lora: multiply queries by sqrt(D/Q) (LongCat, dots3).
        mla_scale_kv_lora: multiply latents by sqrt(D/R) before they are cached (LongCat, dots3).
        output_gate: heads are multiplied by a sigmoid before o_proj. "head" is one gate a head from
            x (Ling 3, dots3), "elementwise" one a channel from x (Kimi K3, Hy4), "query" one a
            channel which q_b_proj makes beside the query, reading the query latent with and without
            its norm (A.X-K2).
        attention_sinks: a learned logit per head in the softmax's denominator (Hy4).
        sliding_window: a token attends to this many tokens, itself included; None to all.
        llama_4_scaling_beta: queries times 1 + beta ln(1 + floor(position / original)) (Mistral 4).
        llama_4_original_max_position_embeddings: that original length, in tokens.
        query_scale_ssmax: queries times s ln(position + 1) + b, s and b learned per head (SSMax,
            Mistral Large 4).
        index_topk: K, tokens that a query of sparse attention attends to, the best by an indexer's
            scores (DeepSeek-V3.2, arXiv 2512.02556); None attends to all.
        index_n_heads: heads of the indexer's queries.
        index_head_dim: I, width of its keys, one of which the cache holds per token.
        indexer_type: "full" has an indexer, "shared" attends to what the last layer with one before
            it has chosen (GLM-5.2, Hy4).
        indexer_rope_interleave: `rope_interleave` of the indexer's own weights.
        index_rope_last: the last P of the I channels are rotated (Hy4), not the first.
        index_norm_eps: epsilon of the LayerNorm on the indexer's keys.
        index_query_scale_ssmax: SSMax on the indexer's queries (Mistral Large 4).
        index_kpool: tokens that are pooled to one index key, so that whole pools are chosen
            (GLM-5.3-Flash); None chooses single tokens.
        index_kpool_always_select_tail: the tokens behind the last whole pool are attended to too.
        kv_source_layer: the layer has no kv_a_proj and attends to the cache that the layer of this
            number has handed on (Mistral Large 4); None has its own.
        kv_store_layer: the number under which the layer hands its cache on; None does not.
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
    num_mla_layers: int | None = None
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rope_inv_freq: tuple[float, ...] | None = None
    mla_use_nope: bool = False
    attention_bias: bool | tuple[str, ...] = False
    latent_norm: bool = True
    latent_norm_eps: float = 1e-6
    k_rope_norm: bool = False
    mla_scale_q_lora: bool = False
    mla_scale_kv_lora: bool = False
    output_gate: Literal["head", "elementwise", "query"] | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    llama_4_scaling_beta: float | None = None
    llama_4_original_max_position_embeddings: int | None = None
    query_scale_ssmax: bool = False
    index_topk: int | None = None
    index_n_heads: int | None = None
    index_head_dim: int = 128
    indexer_type: Literal["full", "shared"] = "full"
    indexer_rope_interleave: bool = False
    index_rope_last: bool = False
    index_norm_eps: float = 1e-6
    index_query_scale_ssmax: bool = False
    index_kpool: int | None = None
    index_kpool_always_select_tail: bool = True
    kv_source_layer: int | None = None
    kv_store_layer: int | None = None
    softmax_scale: float | None = None

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_mapping(self.rope_scaling))
        for key in _POSITIVE_INTEGERS:
            value = getattr(self, key)
            _check(_is_int(value) and value > 0, key, value, "a positive whole number")
        for key in _OPTIONAL_INTEGERS:
            value = getattr(self, key)
            allowed = "a positive whole number or None"
            _check(value is None or (_is_int(value) and value > 0), key, value, allowed)
        for key in ("qk_nope_head_dim", "qk_rope_head_dim"):
            value = getattr(self, key)
            _check(_is_int(value) and value >= 0, key, value, "a whole number >= 0")
        for key in _SWITCHES:
            value = getattr(self, key)
            _check(isinstance(value, bool), key, value, "True or False")
        for key in ("rope_theta", "latent_norm_eps", "index_norm_eps", "softmax_scale",
                    "llama_4_scaling_beta"):  # fmt: skip
            value = getattr(self, key)
            if value is None and key in ("softmax_scale", "llama_4_scaling_beta"):
                continue
            _check(_is_number(value) and value > 0, key, value, "a positive number")
            object.__setattr__(self, key, float(value))
        if isinstance(self.attention_bias, list):
            object.__setattr__(self, "attention_bias", tuple(self.attention_bias))
        names = self.attention_bias if isinstance(self.attention_bias, tuple) else ()
        _check(
            (bool(names) or isinstance(self.attention_bias, bool))
            and all(name in _PROJECTIONS for name in names),
            "attention_bias",
            self.attention_bias,
            f"True, False or names among {_PROJECTIONS}",
        )
        _check(
            self.output_gate in (None, "head", "elementwise", "query"),
            "output_gate",
            self.output_gate,
            "None, 'head', 'elementwise' or 'query'",
        )
        self._check_rope()
        self._check_together()
        self._check_sparse()

    def _check_rope(self) -> None:
        half = self.qk_rope_head_dim // 2
        _check(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "even: rotary channels turn in pairs",
        )
        scaling = self.rope_scaling
        _check(
            scaling is None or isinstance(scaling, RopeScaling),
            "rope_scaling",
            scaling,
            "a RopeScaling, a mapping or None",
        )
        given = {"rope_inv_freq": self.rope_inv_freq}
        if scaling is not None and scaling.rope_type == "longrope":
            given["rope_scaling.short_factor"] = scaling.short_factor
            given["rope_scaling.long_factor"] = scaling.long_factor
        for key, value in given.items():
            if value is not None:
                _check(
                    isinstance(value, list | tuple)
                    and len(value) == half
                    and all(_is_number(v) and v > 0 for v in value),
                    key,
                    value,
                    f"positive numbers, of length qk_rope_head_dim / 2 = {half}",
                )
        if self.rope_inv_freq is not None:
            object.__setattr__(self, "rope_inv_freq", tuple(float(v) for v in self.rope_inv_freq))

    def _check_together(self) -> None:
        """What one key asks of another."""
        _check(
            self.qk_head_dim > 0,
            "qk_nope_head_dim",
            self.qk_nope_head_dim,
            "positive where qk_rope_head_dim is 0",
        )
        _check(
            not (self.k_rope_norm and self.qk_rope_head_dim == 0),
            "k_rope_norm",
            True,
            "False where qk_rope_head_dim is 0",
        )
        if self.q_lora_rank is None:
            needless = "False where q_lora_rank is None"
            _check(not self.mla_scale_q_lora, "mla_scale_q_lora", True, needless)
            allowed = "another where q_lora_rank is None"
            _check(self.output_gate != "query", "output_gate", "query", allowed)
        original = self.llama_4_original_max_position_embeddings
        _check(
            (self.llama_4_scaling_beta is None) == (original is None),
            "llama_4_original_max_position_embeddings",
            original,
            "given if and only if llama_4_scaling_beta is",
        )

    def _check_sparse(self) -> None:
        """What sparse attention and a cache of another layer ask."""
        _check(
            self.indexer_type in ("full", "shared"),
            "indexer_type",
            self.indexer_type,
            "'full' or 'shared'",
        )
        for key in ("kv_source_layer", "kv_store_layer"):
            value = getattr(self, key)
            allowed = "a layer's number or None"
            _check(value is None or (_is_int(value) and value >= 0), key, value, allowed)
        both = self.kv_source_layer is not None and self.kv_store_layer is not None
        needless = "None where kv_source_layer is given: a cache is handed on by its own layer"
        _check(not both, "kv_store_layer", self.kv_store_layer, needless)
        if self.index_topk is None:
            shared = self.indexer_type == "shared"
            _check(not shared, "indexer_type", "shared", "'full' where index_topk is None")
            _check(self.index_kpool is None, "index_kpool", self.index_kpool,
                   "None where index_topk is None")  # fmt: skip
            return
        heads = self.index_n_heads
        _check(heads is not None, "index_n_heads", heads, "given where index_topk is")
        _check(
            self.index_head_dim >= self.qk_rope_head_dim,
            "index_head_dim",
            self.index_head_dim,
            f"at least qk_rope_head_dim={self.qk_rope_head_dim}, channels that are rotated",
        )
        _check(self.sliding_window is None, "sliding_window", self.sliding_window,
               "None where index_topk is given")  # fmt: skip
        pool = self.index_kpool or 1
        _check(
            self.index_topk % pool == 0,
            "index_topk",
            self.index_topk,
            f"a multiple of index_kpool={pool}",
        )

    @property
    def qk_head_dim(self) -> int:
        """H + P, the width of a query and of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def mla_layers(self) -> int:
        """How many of these attentions, each with a cache of its own, the whole model has.

        >>> [MLAConfig.from_preset(name).mla_layers for name in ("deepseek_v3", "kimi_linear")]
        [61, 7]
        """
        return self.num_hidden_layers if self.num_mla_layers is None else self.num_mla_layers

    @property
    def has_indexer(self) -> bool:
        """Whether the layer chooses tokens itself: sparse attention whose choice is not shared.

        >>> MLAConfig.from_preset("deepseek_v32").has_indexer
        True
        """
        return self.index_topk is not None and self.indexer_type == "full"

    def is_sparse(self, slots: int) -> bool:
        """Whether a query may be kept from any of `slots` tokens before it.

        >>> [MLAConfig.from_preset("deepseek_v32").is_sparse(slots) for slots in (2048, 2049)]
        [False, True]
        """
        if self.index_topk is None:
            return False
        if self.index_kpool is None:
            return self.index_topk < slots
        if not self.index_kpool_always_select_tail:
            return True
        return self.index_topk // self.index_kpool < slots // self.index_kpool

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
        if scaling is None or scaling.rope_type not in YARN or self.mla_use_nope:
            return scale
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim or 0.0) ** 2

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        _check_keys(changes, type(self), "replace()")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The config of a released model, one of `presets()`."""
        name = cls.preset_file(name)
        if name not in presets():
            close = difflib.get_close_matches(str(name), presets(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown preset {name!r}.{hint} Presets: {', '.join(presets())}.")
        return cls.from_toml(configs_dir() / "models" / f"{name}.toml")

    @staticmethod
    def preset_file(name: str) -> str:
        """The preset that a release of another name shares, without its suffix."""
        return _PRESET_ALIASES.get(name, name)

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> Self:
        """Reads a TOML file that holds the fields of this class, `rope_scaling` as a table.

        A [decoder] table is for `models.DecoderConfig` and left alone.
        """
        path = pathlib.Path(path)
        try:
            keys = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
        keys.pop("decoder", None)
        keys.setdefault("q_lora_rank", None)  # TOML cannot say null
        return cls._from_mapping(keys, str(path))

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any] | str | os.PathLike, *, layer: int | None = None
    ) -> Self:
        """Reads a Hugging Face config.json: a mapping, the file, its folder, or a repo id.

        Keys that it leaves out have the defaults of the family's config class. Both styles are
        read: `rope_theta` with `rope_scaling` (the hub's files) and
        `rope_parameters` (transformers 5); so are Mistral's params.json and models that nest their
        language model. `mla_jax.families` says what each family's code does beyond its config.
        Keys that do not shape attention are left alone; one that asks for attention which this
        layer does not compute is refused.

        Args:
            config: the mapping or path.
            layer: which layer, where a model's attention layers differ (dots3, Mistral Large 4).

        Raises:
            ValueError: a needed key is missing, a value is impossible, or the model needs a
                variation that is not supported; the message names the key.
            FileNotFoundError: no config.json (or params.json) there.
        """
        from mla_jax import families  # it imports this module

        hf, where = families.read_config(config)
        return cls._from_mapping(families.attention_fields(hf, where, layer), where)

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


def configs_dir() -> pathlib.Path:
    """The folder `configs/`: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(str(importlib.resources.files("mla_jax")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "models").is_dir():
            return folder
    raise FileNotFoundError(f"no configs/ with presets in {package} or beside it.")


def presets() -> tuple[str, ...]:
    """Names that `MLAConfig.from_preset` knows.

    >>> "deepseek_v3" in presets()
    True
    """
    return tuple(sorted(path.stem for path in (configs_dir() / "models").glob("*.toml")))


def aliases(preset: str) -> tuple[str, ...]:
    """Other names of a preset: of releases that share its shapes.

    >>> aliases("deepseek_v3")
    ('deepseek_r1', 'deepseek_v3_1')
    """
    return tuple(sorted(name for name, file in _PRESET_ALIASES.items() if file == preset))
