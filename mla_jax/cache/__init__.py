"""The latent cache: what MLA keeps of every token, R + P numbers shared by all heads.

A functional pytree: every method returns a new cache, and under `jax.jit` with donation the new one
lives in the old one's memory. Rows are filled from slot 0 without gaps and have lengths of their
own; slots past a row's length hold anything and are never read.

Letters: B batch rows, S slots per row (capacity), T new tokens, R latent, P rotary channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Int

from mla_jax.config import MLAConfig
from mla_jax.ops.dispatch import default_device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Latents and rotary keys of one layer, for B rows of up to S tokens.

    Attributes:
        latent: normalized (and, in LongCat, scaled) latents, [B S R].
        k_rope: rotated rotary keys, [B S P].
        length: int32 [B], tokens that each row holds.
        overflowed: bool [B], rows that were given more tokens than they have slots since they were
            last empty or cut back: the tokens beyond capacity were dropped, nothing was
            overwritten. May be left out.

    >>> config = MLAConfig.from_preset("tiny")
    >>> cache = LatentCache.init(config, batch_size=2, max_length=8)
    >>> cache = cache.append(jnp.ones((2, 3, 64)), jnp.ones((2, 3, 16)), lengths=jnp.array([3, 1]))
    >>> cache.length
    Array([3, 1], dtype=int32)
    """

    latent: Float[Array, "B S R"]
    k_rope: Float[Array, "B S P"]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"] = None  # pyrefly: ignore

    def __post_init__(self):
        # Trees of this type also hold specs, shapes and None: only arrays get the default.
        if self.overflowed is None and isinstance(self.length, jax.Array | np.ndarray):
            object.__setattr__(self, "overflowed", jnp.zeros(self.length.shape, bool))

    @classmethod
    def init(
        cls, config: MLAConfig, batch_size: int, max_length: int, dtype=jnp.float32
    ) -> "LatentCache":
        """An empty cache of `batch_size` rows with `max_length` slots each, in `dtype`.

        Raises:
            ValueError: a size below 1, or a dtype that attention does not compute in.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value!r}: {name} must be a whole number of at least 1.")
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
            raise ValueError(
                f"dtype={dtype.name}: a cache holds bfloat16, float16, float32 or float64."
            )
        return cls(
            latent=jnp.zeros((batch_size, max_length, config.kv_lora_rank), dtype),
            k_rope=jnp.zeros((batch_size, max_length, config.qk_rope_head_dim), dtype),
            length=jnp.zeros((batch_size,), jnp.int32),
        )

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.latent.shape[0]

    @property
    def max_length(self) -> int:
        """S, slots of a row."""
        return self.latent.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the latents and rotary keys."""
        return self.latent.nbytes + self.k_rope.nbytes

    def replace(self, **changes) -> "LatentCache":
        """A copy with some arrays replaced."""
        return dataclasses.replace(self, **changes)

    def append(
        self,
        latent: Float[Array, "B T R"],
        k_rope: Float[Array, "B T P"],
        lengths: Int[Array, "B"] | None = None,
    ) -> "LatentCache":
        """Writes the first `lengths[b]` of T new tokens (all where None) behind each row's last.

        Tokens that do not fit are dropped and the row's `overflowed` set; outside jit, where
        lengths are known, that is an error instead.

        Raises:
            ValueError: shapes or dtypes that are not this cache's; `lengths` out of 0..T; or,
                outside jit, a row that would overflow.
        """
        batch, slots = self.batch_size, self.max_length
        tokens = latent.shape[1] if latent.ndim == 3 else 0
        for name, new, held in (("latent", latent, self.latent), ("k_rope", k_rope, self.k_rope)):
            shape = (batch, tokens, held.shape[-1])
            if new.shape != shape or not tokens:
                raise ValueError(
                    f"{name} has shape {new.shape}: this cache of {batch} rows takes "
                    f"[{batch} T {held.shape[-1]}] with T >= 1."
                )
            if new.dtype != held.dtype:
                raise ValueError(f"{name} is {new.dtype}, the cache holds {held.dtype}: cast one.")
        lengths = self._row_counts(lengths, tokens)
        end = self.length + lengths
        self._check_capacity(end)
        token = jnp.arange(tokens, dtype=jnp.int32)[None]
        slot = self.length[:, None] + token
        # Padding goes out of bounds too, each token to a slot of its own, and is dropped.
        slot = jnp.where(token < lengths[:, None], slot, slots + token)
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]

        def write(held, new):
            if tokens <= 8 and held.shape[2] % 128 and default_device().platform == "tpu":
                return _write_singly(held, new, slot)
            held = held.at[row, slot].set(new, mode="drop", unique_indices=True)
            # Fused into a matmul that reads the cache, the write would copy it.
            return jax.lax.optimization_barrier(held)

        return LatentCache(
            latent=write(self.latent, latent),
            k_rope=write(self.k_rope, k_rope),
            length=jnp.minimum(end, slots),
            overflowed=self.overflowed | (end > slots),
        )

    def truncate(self, lengths: Int[Array, "B"] | int) -> "LatentCache":
        """Forgets the tokens past `lengths`, e.g. rejected drafts. Longer than a row: no change."""
        if not isinstance(lengths, jax.core.Tracer) and (np.asarray(lengths) < 0).any():
            raise ValueError(f"lengths={np.asarray(lengths)}: they must be at least 0.")
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (self.batch_size,))
        # A row cut below its capacity holds exactly the tokens it says, whatever was dropped.
        return self.replace(
            length=jnp.minimum(self.length, lengths),
            overflowed=self.overflowed & (lengths >= self.length),
        )

    def insert(self, row: "LatentCache", index: Int[Array, ""] | int) -> "LatentCache":
        """Puts the one row of another cache, of at most as many slots, into row `index`.

        Raises:
            ValueError: not one row, more slots, other widths or dtype; or, outside jit, an index
                that is not a row. Under jit such an index changes nothing.
        """
        if row.batch_size != 1 or row.max_length > self.max_length:
            raise ValueError(
                f"row has {row.batch_size} rows of {row.max_length} slots: insert takes one row of "
                f"at most {self.max_length} slots."
            )
        for name in ("latent", "k_rope"):
            new, held = getattr(row, name), getattr(self, name)
            if new.shape[2:] != held.shape[2:] or new.dtype != held.dtype:
                raise ValueError(
                    f"row.{name} is {new.dtype} of width {new.shape[2]}; this cache holds "
                    f"{held.dtype} of width {held.shape[2]}."
                )
        if not isinstance(index, jax.core.Tracer) and not 0 <= index < self.batch_size:
            raise ValueError(f"index={index}: this cache has rows 0 to {self.batch_size - 1}.")
        index = jnp.asarray(index, jnp.int32)
        index = jnp.where(index < 0, self.batch_size, index)  # negative would count from the end
        slots = row.max_length
        return LatentCache(
            latent=self.latent.at[index, :slots].set(row.latent[0], mode="drop"),
            k_rope=self.k_rope.at[index, :slots].set(row.k_rope[0], mode="drop"),
            length=self.length.at[index].set(row.length[0], mode="drop"),
            overflowed=self.overflowed.at[index].set(row.overflowed[0], mode="drop"),
        )

    def reset(self, rows: Bool[Array, "B"] | None = None) -> "LatentCache":
        """Empties the rows where `rows` is True; all of them where it is None."""
        if rows is None:
            rows = jnp.ones((self.batch_size,), bool)
        if rows.shape != (self.batch_size,) or rows.dtype != jnp.bool_:
            raise ValueError(
                f"rows is {rows.dtype} of shape {rows.shape}: it must be bool [{self.batch_size}]."
            )
        return self.replace(
            length=jnp.where(rows, 0, self.length), overflowed=self.overflowed & ~rows
        )

    def _row_counts(self, lengths, tokens: int) -> Int[Array, "B"]:
        if lengths is None:
            return jnp.full((self.batch_size,), tokens, jnp.int32)
        lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
        if lengths.shape != (self.batch_size,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {lengths.shape}: it must be an integer array "
                f"[B] = ({self.batch_size},)."
            )
        if not isinstance(lengths, jax.core.Tracer):
            known = np.asarray(lengths)  # jax would trace the comparison under jit
            if (known < 0).any() or (known > tokens).any():
                raise ValueError(
                    f"lengths={known}: each must be between 0 and the {tokens} tokens given."
                )
        return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, tokens)

    def _check_capacity(self, end: Int[Array, "B"]) -> None:
        if isinstance(end, jax.core.Tracer):
            return
        over = np.flatnonzero(np.asarray(end) > self.max_length)
        if over.size:
            raise ValueError(
                f"rows {over.tolist()} would hold {np.asarray(end)[over].tolist()} tokens, the "
                f"cache has max_length={self.max_length} slots: make it longer or truncate rows."
            )


def _write_singly(held, new, slot):
    """held.at[row, slot].set(new, mode="drop"), one token after the other.

    On TPU an array narrower than 128 is laid out slot-minor, and a scatter would copy all of it to
    another layout and back; this writes in place.
    """
    batch, tokens, width = new.shape
    last = held.shape[1] - 1

    def step(i, held):
        row, token = i // tokens, i % tokens
        to = slot[row, token]
        at = (row, jnp.minimum(to, last), jnp.int32(0))
        fresh = jax.lax.dynamic_slice(new, (row, token, 0), (1, 1, width))
        kept = jax.lax.dynamic_slice(held, at, (1, 1, width))
        return jax.lax.dynamic_update_slice(held, jnp.where(to <= last, fresh, kept), at)

    return jax.lax.fori_loop(0, batch * tokens, step, held)


export.register_pytree_node_serialization(
    LatentCache,
    serialized_name="mla_jax.LatentCache",
    serialize_auxdata=lambda aux: b"",
    deserialize_auxdata=lambda data: (),
)
