"""Latents in one byte a number: fp8 or int8 with a scale for every token and 128 of its channels.

A latent that is appended is quantised once and never again: whatever the cache does later (fork,
insert, truncate, pages) copies bytes. Of the layer's 576 numbers a token the 512 of the latent take
512 bytes and 16 of scales; the 64 of the rotary key stay as they are, because rounding moves their
angle at every distance alike: 656 bytes in place of 1152.

Scales are powers of two, in float32. So a number times its scale is exact in bfloat16 (fp8 has 4
significant bits, int8 has 7, and bfloat16 takes 8), and a kernel makes the product by an addition
to the exponent. The price is at most one bit of int8 and none of fp8, whose steps follow the
number's own size.

Letters: B batch rows, S slots of a row, T new tokens, R latent channels, C groups of 128 of them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_jax.cache.dense import Dense
from mla_jax.plain import Whole

GROUP = 128  # channels that share a scale
# The largest number of every type that latents may be held in.
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
ENCODINGS = tuple(_LARGEST)
# The smallest exponent of a scale: a group of numbers below 1e-28 loses bits to it. Its products
# with fp8's smallest number, 2^-9, stay among float32's normal numbers.
_LEAST = -100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Dense):
    """A `Dense` store whose latents are held in fp8 or int8, with their scales.

    To layers and attention it is a store of latents in the dtype of its rotary keys: `write` takes
    them, `block` and `at` give them. A group that holds a number that is not finite becomes NaN. It
    has no derivative: what asks for one is an error.

    Attributes:
        arrays: latent [B S R] in fp8 or int8, latent_scale [B S C] in float32, and others as they
            are.

    >>> store = Scaled.init(1, 4, {"latent": 130, "k_rope": 2}, jnp.int8, jnp.float32)
    >>> new = {"latent": jnp.full((1, 1, 130), 0.3), "k_rope": jnp.ones((1, 1, 2))}
    >>> store = store.write(jnp.array([[2]]), **new)
    >>> store.latent[0, 2, 0], store.latent_scale[0, 2], store.block(0, 4)["latent"][0, 2, 0]
    (Array(77, dtype=int8), Array([0.00390625, 0.00390625], dtype=float32), Array(0.30078125, ...
    """

    @classmethod
    def init(cls, batch_size: Whole, slots: Whole, widths: dict[str, int], held, dtype) -> "Scaled":
        """An empty store.

        Args:
            batch_size, slots: B and S.
            widths: channels of every array by its name, "latent" among them.
            held: what latents are held in, one of `ENCODINGS`.
            dtype: in which they are written and read, and in which the other arrays are held.
        """
        whole = {name: (width, dtype) for name, width in widths.items()}
        whole["latent"] = (widths["latent"], held)
        whole["latent_scale"] = (math.ceil(widths["latent"] / GROUP), jnp.float32)
        return cls({k: jnp.zeros((batch_size, slots, w), d) for k, (w, d) in whole.items()})

    @property
    def encoding(self) -> str:
        """What latents are held in."""
        return self.arrays["latent"].dtype.name

    @property
    def taken(self) -> dict[str, Any]:
        """See `Dense.taken`."""
        latent = self.arrays["latent"].shape[2:], self.arrays["k_rope"].dtype
        others = {name: what for name, what in super().taken.items() if name != "latent_scale"}
        return others | {"latent": latent}

    def encode(self, new: dict[str, Array]) -> dict[str, Array]:
        """See `Dense.encode`."""
        if "latent" not in new:
            return new
        latent, scale = quantise(new["latent"], self.encoding)
        return new | {"latent": latent, "latent_scale": scale}

    def decode(self, held: dict[str, Array]) -> dict[str, Array]:
        """See `Dense.decode`."""
        if "latent" not in held:
            return held
        others = {name: array for name, array in held.items() if name != "latent_scale"}
        dtype = self.arrays["k_rope"].dtype
        return others | {"latent": dequantise(held["latent"], held["latent_scale"], dtype)}


def is_encoding(dtype) -> bool:
    """Whether a cache of this dtype has scales.

    >>> is_encoding("float8_e4m3fn"), is_encoding(jnp.bfloat16), is_encoding(None)
    (True, False, False)
    """
    return dtype is not None and jnp.dtype(dtype).name in ENCODINGS


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def quantise(latent: Float[Array, "*B R"], held: str) -> tuple[Array, Float[Array, "*B C"]]:
    """Latents in fp8 or int8, and their scales.

    A scale is the smallest power of two by which its group's numbers fit.

    >>> quantise(jnp.array([[449.0, 1.0]]), "float8_e4m3fn")
    (Array([[224, 0.5]], dtype=float8_e4m3fn), Array([[2.]], dtype=float32))
    """
    width = latent.shape[-1]
    groups = _groups(latent.astype(jnp.float32))
    scale, inverse = scale_of(jnp.abs(groups).max(-1), held)
    parts = groups * inverse[..., None]
    if held == "int8":
        parts = jnp.round(parts)
    return parts.reshape(*latent.shape[:-1], -1)[..., :width].astype(held), scale


def scale_of(largest: Float[Array, "*B"], held: str) -> tuple[Array, Array]:
    """The scale of a group whose largest magnitude is given, and its inverse; NaN if not finite."""
    # largest <= limit 2^exponent, by the bits of both: what `log2` gives may be off by one.
    significand, exponent = math.frexp(_LARGEST[held])
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    over = (bits & 0x7FFFFF) > round((2 * significand - 1) * 2**23)
    power = jnp.maximum((bits >> 23) - 127 - (exponent - 1) + over, _LEAST)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000  # Pallas for GPUs has no `isfinite`
    scale, inverse = (jnp.where(finite, _power_of_two(n), jnp.nan) for n in (power, -power))
    return scale, inverse


@quantise.defjvp
def _quantise_jvp(held, primals, tangents):
    raise NotImplementedError(
        f"a cache of {held} latents has no derivative: train without a cache, or differentiate "
        "through one of bfloat16 or float32."
    )


def dequantise(latent: Array, scale: Float[Array, "*B C"], dtype) -> Float[Array, "*B R"]:
    """What `quantise` made: exactly, but for what float16 has no room for.

    >>> dequantise(*quantise(jnp.array([[449.0, 1.0]]), "float8_e4m3fn"), jnp.bfloat16)
    Array([[448, 1]], dtype=bfloat16)
    """
    width = latent.shape[-1]
    # float16 has no such small scales.
    wide = jnp.promote_types(dtype, jnp.float32) if dtype == jnp.float16 else dtype
    each = jnp.repeat(scale.astype(wide), GROUP, axis=-1)[..., :width]
    return (latent.astype(wide) * each).astype(dtype)


def _groups(latent):
    """[... R] as [... C 128], the last group filled up with zeros."""
    width = latent.shape[-1]
    count = math.ceil(width / GROUP)
    padding = [(0, 0)] * (latent.ndim - 1) + [(0, count * GROUP - width)]
    return jnp.pad(latent, padding).reshape(*latent.shape[:-1], count, GROUP)


def _power_of_two(exponent):
    """2^exponent for whole numbers from -126 to 127, float32."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
