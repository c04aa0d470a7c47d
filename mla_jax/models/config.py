"""The shape of a whole model of DeepSeek's kind: from a preset or a Hugging Face config.json."""

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, Self

from mla_jax import families
from mla_jax.config import MLAConfig, configs_dir


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a `Decoder`; keys are the Hugging Face config's where it has them.

    Attributes:
        attention: of every layer; its hidden_size and num_hidden_layers are the model's.
        vocab_size: W; by default 256, one word a byte.
        intermediate_size: F of the dense layers; None makes it 8 D / 3, rounded down.
        moe_intermediate_size: F of one expert.
        n_routed_experts: E; None has dense layers only.
        num_experts_per_tok: K, of these and of zero_expert_num.
        n_shared_experts: experts' widths that every token's shared expert has; 0 is none.
        first_k_dense_replace: dense layers before the first mixture.
        scoring_func: how the router scores: "softmax" (V2) or "sigmoid" (V3).
        norm_topk_prob: the chosen experts' weights are divided by their sum.
        routed_scaling_factor: and multiplied by this.
        n_group: G; where above 1, experts are chosen from the best `topk_group` groups only.
        topk_group: those groups. A group counts as its best expert under softmax, as the sum of its
            two best under sigmoid.
        rms_norm_eps: epsilon of the norms around attention and MLP.
        tie_word_embeddings: the head is the embedding.
        embed_scale, residual_scale, logit_scale: MiniCPM3's factors on embeddings, on what a layer
            adds, and on logits.
        num_nextn_predict_layers: blocks for multi-token prediction behind the layers.
        indexer_types: of sparse attention, "full" or "shared" for every layer (`MLAConfig`'s
            indexer_type); None is full for all.
        selection_bias: the router's choice has a bias that its weights have not; None is so where
            scoring_func is "sigmoid".
        zero_expert_num: experts behind the E others that return their input (LongCat).
        shortcut: every layer has two attentions, two MLPs, and experts beside them (LongCat).
        eos_token_ids: tokens that end a text.
        model_type: the family, as config.json names it; it is what a saved model is called, and
            not compared. None is DeepSeek's.

    Raises:
        ValueError: a value that cannot be; the message names the key.

    >>> config = DecoderConfig.from_preset("deepseek_v3")
    >>> config.n_routed_experts, config.num_experts_per_tok, config.vocab_size
    (256, 8, 129280)
    >>> [layer for layer in range(61) if not config.is_sparse(layer)]
    [0, 1, 2]
    """

    attention: MLAConfig
    vocab_size: int = 256
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int = 1
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    num_nextn_predict_layers: int = 0
    indexer_types: tuple[str, ...] | None = None
    selection_bias: bool | None = None
    zero_expert_num: int = 0
    shortcut: bool = False
    eos_token_ids: tuple[int, ...] = ()
    model_type: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 8 * self.attention.hidden_size // 3)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        whole = ["vocab_size", "intermediate_size", "n_group", "topk_group", "num_experts_per_tok"]
        if self.n_routed_experts is not None:
            whole += ["n_routed_experts", "moe_intermediate_size"]
        for key in whole:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key}={value!r}: {key} must be a positive whole number.")
        for key in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers",
                    "zero_expert_num"):  # fmt: skip
            value = getattr(self, key)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{key}={value!r}: {key} must be a whole number >= 0.")
        for key in ("rms_norm_eps", "routed_scaling_factor", "embed_scale", "residual_scale",
                    "logit_scale"):  # fmt: skip
            _positive(key, getattr(self, key))
        for key in ("norm_topk_prob", "tie_word_embeddings"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r}: {key} must be true or false.")
        if any(not isinstance(token, int) or token < 0 for token in self.eos_token_ids):
            raise ValueError(f"eos_token_id={self.eos_token_ids!r}: these must be tokens.")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r}: must be softmax or sigmoid.")
        self._check_layers()
        experts = self.n_routed_experts or self.num_experts_per_tok
        experts += self.zero_expert_num
        inside = self.topk_group * (experts // self.n_group)
        if experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group}: it must divide n_routed_experts={experts} and be at "
                f"least topk_group={self.topk_group}."
            )
        if self.num_experts_per_tok > inside:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: only {inside} can be chosen from."
            )

    def _check_layers(self) -> None:
        count, types = self.attention.num_hidden_layers, self.indexer_types
        if types is not None:
            object.__setattr__(self, "indexer_types", tuple(types))
            known = all(kind in ("full", "shared") for kind in types)
            if len(types) != count or not known or types[0] != "full":
                raise ValueError(
                    f"indexer_types={types!r}: it must have 'full' or 'shared' for each of "
                    f"num_hidden_layers={count}, the first of them 'full'."
                )
            if self.attention.index_topk is None and "shared" in types:
                raise ValueError(f"indexer_types={types!r}: index_topk is None: none is chosen.")
        if self.shortcut and (self.n_routed_experts is None or self.first_k_dense_replace):
            raise ValueError(
                f"shortcut=True: n_routed_experts={self.n_routed_experts}, first_k_dense_replace="
                f"{self.first_k_dense_replace}: every layer must have experts."
            )
        if self.shortcut and (self.residual_scale != 1 or self.num_nextn_predict_layers):
            raise ValueError(
                f"shortcut=True: residual_scale={self.residual_scale}, num_nextn_predict_layers="
                f"{self.num_nextn_predict_layers}: they must be 1 and 0."
            )

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router's choice has a bias of its own."""
        given = self.selection_bias
        return self.scoring_func == "sigmoid" if given is None else given

    def attention_of(self, layer: int) -> MLAConfig:
        """The attention of a layer; the block for multi-token prediction, behind the last, is full.

        >>> DecoderConfig.from_preset("glm_5_2").attention_of(3).indexer_type
        'shared'
        """
        types = self.indexer_types
        if types is None or layer >= len(types):
            return self.attention
        return self.attention.replace(indexer_type=types[layer])

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The whole shape of a released model: a preset of `MLAConfig` with a [decoder] table.

        Raises:
            ValueError: no such preset, or one that describes the attention only.
        """
        attention = MLAConfig.from_preset(name)
        path = configs_dir() / "models" / f"{MLAConfig.preset_file(name)}.toml"
        decoder = tomllib.loads(path.read_text(encoding="utf-8")).get("decoder")
        if decoder is None:
            raise ValueError(
                f"the preset {name!r} describes the attention only; whole models: "
                f"{', '.join(decoder_presets())}."
            )
        return cls(attention=attention, **decoder)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike) -> Self:
        """Reads a config.json: see `MLAConfig.from_hf`.

        Raises:
            ValueError: a family whose decoder has another shape, or a key that asks for what this
                decoder does not do.
        """
        hf, where = families.read_config(config)
        attention = MLAConfig.from_hf(hf)
        try:
            return cls(attention=attention, **families.decoder_fields(hf, attention, where))
        except (TypeError, ValueError) as error:
            message = str(error)
            raise ValueError(message if where in message else f"{where}: {message}") from error


def _positive(key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"{key}={value!r}: it must be a positive number.")


def decoder_presets() -> tuple[str, ...]:
    """Presets that describe a whole decoder.

    >>> "deepseek_v3" in decoder_presets(), "axk1" in decoder_presets()
    (True, False)
    """
    files = sorted((configs_dir() / "models").glob("*.toml"))
    return tuple(file.stem for file in files if "\n[decoder]" in file.read_text(encoding="utf-8"))
