"""Rotary position embedding for the P channels that carry position in MLA.

Every pair of channels turns by position x inverse frequency (Su et al. 2021, arXiv 2104.09864,
eq. 34). Frequencies are float64 on the host, stretched as YaRN or LongRoPE say; nothing is stored
in a module. Both layouts of stored weights give the same order of output channels, first members of
all pairs, then second members: queries and keys share it, so scores do not depend on it.

Letters: B batch, T tokens, N heads, P rotary channels.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_jax.config import YARN, MLAConfig, yarn_mscale


def inverse_frequencies(config: MLAConfig, length: int | None = None) -> np.ndarray:
    """Radians per token of the P/2 channel pairs, float64 [P/2].

    YaRN: arXiv 2309.00071 section 3.2 with the rounding of Hugging Face's code; the upper end of
    the correction range is clamped to P-1, not to P/2-1. LongRoPE has a list for contexts up to the
    original length and one for longer ones: `length` says how long this one may become (the slots
    of a cache, the tokens of a pass without one), so that one choice holds for a cache's life.

    Args:
        config: the layer.
        length: tokens that the context may hold; None is max_position_embeddings.
    """
    width, scaling = config.qk_rope_head_dim, config.rope_scaling
    if config.rope_inv_freq is not None:
        return np.array(config.rope_inv_freq, np.float64)
    pair = np.arange(width // 2, dtype=np.float64)
    base = config.rope_theta ** (2 * pair / max(width, 1))
    if scaling is None:
        return 1 / base
    factor = scaling.factor or 1.0  # only longrope goes without
    if scaling.rope_type == "linear":
        return 1 / (factor * base)
    original = scaling.original_max_position_embeddings or 0
    if scaling.rope_type == "longrope":
        extended = (config.max_position_embeddings if length is None else length) > original
        return 1 / (np.array(scaling.long_factor if extended else scaling.short_factor) * base)

    def channel(rotations: float) -> float:  # the pair that turns so often within `original`
        return (
            width
            * math.log(original / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((pair - low) / (high - low), 0, 1)
    return interpolated / (factor * base) + (1 - interpolated) / base


def attention_factor(config: MLAConfig) -> float:
    """The factor on cos and sin: 1 except under YaRN and LongRoPE."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "linear":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type in YARN:
        if scaling.mscale and scaling.mscale_all_dim:
            return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
                scaling.factor, scaling.mscale_all_dim
            )
        return yarn_mscale(scaling.factor, 1.0)
    original = scaling.original_max_position_embeddings or 0
    factor = scaling.factor or config.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def angles(positions: Int[Array, "*shape"], inv_freq: np.ndarray) -> Float[Array, "*shape half"]:
    """Position x inv_freq in [-pi, pi], float32, right to 1e-6 rad at position 131072.

    The plain float32 product is off by up to 0.008 rad there. Turns are counted in fixed point
    instead: int32 arithmetic wraps at 2^32, and so does an angle at a full turn, so the integer
    product is exact modulo one turn. 8 further bits of the frequency carry 1e-5 rad at position
    2^22; |position| must stay below 2^23.
    """
    turns = np.round(inv_freq / (2 * math.pi) * 2.0**40).astype(np.int64)  # 40-bit fractions
    position = jnp.asarray(positions, jnp.int32)[..., None]
    turns = turns.reshape((1,) * (position.ndim - 1) + turns.shape)
    high = (turns >> 8).astype(np.uint32).view(np.int32)
    low = (turns & 0xFF).astype(np.int32)
    fraction = position * high + ((position * low) >> 8)
    return fraction.astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)


Rotation = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]


def spec(config: MLAConfig) -> tuple:
    """What a rotation depends on besides positions: layers with equal specs share theirs."""
    return (
        config.mla_use_nope, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling,
        config.rope_inv_freq, config.max_position_embeddings,
    )  # fmt: skip


def rotation(
    positions: Int[Array, "*B T"], config: MLAConfig, length: int | None = None
) -> Rotation | None:
    """Cosine and sine of every pair's angle at every position, float32 [B or 1, T, P/2].

    None where nothing is rotated: `mla_use_nope`, or no rotary channels.

    Args:
        positions: int [T], the same for all rows, or [B T].
        config: frequencies, and whether to rotate at all.
        length: tokens that the context may hold, as in `inverse_frequencies`.
    """
    if config.mla_use_nope or config.qk_rope_head_dim == 0:
        return None
    theta = angles(positions, inverse_frequencies(config, length))
    if theta.ndim == 2:
        theta = theta[None]
    factor = np.float32(attention_factor(config))
    return jnp.cos(theta) * factor, jnp.sin(theta) * factor


def rotate(
    x: Float[Array, "B T *N P"], by: Rotation | None, config: MLAConfig
) -> Float[Array, "B T *N P"]:
    """Rotates the channels of queries [B T N P] or of the shared key [B T P].

    Args:
        x: channels in the order of the stored weights (`config.rope_interleave`).
        by: of `rotation`.
        config: the layout of the channels.

    Returns:
        Rotated channels in x's dtype, computed in float32, ordered pair-firsts then pair-seconds.
    """
    if by is None:
        return x
    cos, sin = by if x.ndim == 3 else (part[:, :, None] for part in by)
    x32 = x.astype(jnp.float32)
    if config.rope_interleave:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def apply_rope(
    x: Float[Array, "B T *N P"],
    positions: Int[Array, "*B T"],
    config: MLAConfig,
    length: int | None = None,
) -> Float[Array, "B T *N P"]:
    """`rotate` by the `rotation` of these positions."""
    return rotate(x, rotation(positions, config, length), config)
