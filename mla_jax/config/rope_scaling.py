"""How rotary frequencies are stretched beyond the length a model was trained on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mla_jax.check import check, check_keys, is_int, is_number

YARN = ("yarn", "deepseek_yarn")  # two names of the same formula
_ROPE_TYPES = (*YARN, "longrope", "linear")


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
        check(
            self.rope_type in _ROPE_TYPES,
            prefix + "rope_type",
            self.rope_type,
            f"one of {_ROPE_TYPES}",
        )
        for key in ("short_factor", "long_factor"):
            value = getattr(self, key)
            if value is not None:
                check(
                    isinstance(value, list | tuple) and all(is_number(v) and v > 0 for v in value),
                    prefix + key,
                    value,
                    "a list of positive numbers",
                )
                object.__setattr__(self, key, tuple(float(v) for v in value))
        for key in ("beta_fast", "beta_slow", "attention_factor", "factor"):
            value = getattr(self, key)
            if value is not None:
                check(is_number(value) and value > 0, prefix + key, value, "a positive number")
        for key in ("mscale", "mscale_all_dim"):
            value = getattr(self, key)
            if value is not None:
                check(is_number(value) and value >= 0, prefix + key, value, "a number >= 0")
        original = self.original_max_position_embeddings
        if original is not None or self.rope_type != "linear":
            check(
                isinstance(original, int) and is_int(original) and original > 0,
                prefix + "original_max_position_embeddings",
                original,
                "a positive whole number of tokens",
            )
        check(isinstance(self.truncate, bool), prefix + "truncate", self.truncate, "true or false")
        if self.rope_type != "longrope":
            check(self.factor is not None, prefix + "factor", self.factor, "a positive number")
        else:
            for key in ("short_factor", "long_factor"):
                check(getattr(self, key) is not None, prefix + key, None, "a list of P/2 numbers")

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
        check_keys(given, cls, "rope_scaling")
        return cls(rope_type=rope_type, **given)


def yarn_mscale(factor: float | None, weight: float) -> float:
    """YaRN's 0.1 weight ln(factor) + 1 for factor > 1 (arXiv 2309.00071, eq. 15)."""
    return 1.0 if factor is None or factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
