"""`MLAConfig`: the fields of one MLA layer, where they come from, and what follows from them."""

import dataclasses
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, Self

from mla_jax.check import check, check_keys, is_int, is_number, nearest
from mla_jax.config.checks import check_rope, check_sparse, check_together
from mla_jax.config.files import ALIASES, configs_dir, presets
from mla_jax.config.rope_scaling import YARN, RopeScaling, yarn_mscale

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
            check(is_int(value) and value > 0, key, value, "a positive whole number")
        for key in _OPTIONAL_INTEGERS:
            value = getattr(self, key)
            allowed = "a positive whole number or None"
            check(value is None or (is_int(value) and value > 0), key, value, allowed)
        for key in ("qk_nope_head_dim", "qk_rope_head_dim"):
            value = getattr(self, key)
            check(is_int(value) and value >= 0, key, value, "a whole number >= 0")
        for key in _SWITCHES:
            value = getattr(self, key)
            check(isinstance(value, bool), key, value, "True or False")
        for key in ("rope_theta", "latent_norm_eps", "index_norm_eps", "softmax_scale",
                    "llama_4_scaling_beta"):  # fmt: skip
            value = getattr(self, key)
            if value is None and key in ("softmax_scale", "llama_4_scaling_beta"):
                continue
            check(is_number(value) and value > 0, key, value, "a positive number")
            object.__setattr__(self, key, float(value))
        if isinstance(self.attention_bias, list):
            object.__setattr__(self, "attention_bias", tuple(self.attention_bias))
        names = self.attention_bias if isinstance(self.attention_bias, tuple) else ()
        check(
            (bool(names) or isinstance(self.attention_bias, bool))
            and all(name in _PROJECTIONS for name in names),
            "attention_bias",
            self.attention_bias,
            f"True, False or names among {_PROJECTIONS}",
        )
        check(
            self.output_gate in (None, "head", "elementwise", "query"),
            "output_gate",
            self.output_gate,
            "None, 'head', 'elementwise' or 'query'",
        )
        check_rope(self)
        check_together(self)
        check_sparse(self)

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
        check_keys(changes, type(self), "replace()")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The config of a released model, one of `presets()`."""
        name = cls.preset_file(name)
        if name not in presets():
            hint = nearest(name, presets())
            raise ValueError(f"unknown preset {name!r}.{hint} Presets: {', '.join(presets())}.")
        return cls.from_toml(configs_dir() / "models" / f"{name}.toml")

    @staticmethod
    def preset_file(name: str) -> str:
        """The preset that a release of another name shares, without its suffix."""
        return ALIASES.get(name, name)

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
        check_keys(keys, cls, where)
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
