"""What a model on a mesh costs each device: bytes of weights and cache, and what a step moves.

Weights and cache are counted by their shapes. What moves over the links is the closed form of the
layout: the gathers, exchanges and sums that a step cannot do without, as bytes that one device
sends, at least. Of s bytes that n devices gather or exchange each sends s (n-1)/n, of s bytes that
they sum 2 s (n-1)/n, and of sums that are scattered s (n-1)/n of what is summed.

Letters: b rows of a device times T tokens; N heads, Q, R, P, D, W as in `mla_jax.MLAConfig` and
`sharding.Rules`; K experts per token. An axis of a letter is shared where rows are split over it as
well, m parts; its other axes make o parts.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax import sharding as places
from mla_jax.models.config import DecoderConfig
from mla_jax.models.decoder import Decoder
from mla_jax.sharding import Axes, Rules


@dataclasses.dataclass(frozen=True)
class Placement:
    """What one device of a mesh holds and sends.

    Attributes:
        devices: of the mesh.
        batch_size: rows of all devices.
        row_parts: over how many parts these are split.
        weight_bytes: of a device.
        cache_bytes: of a device.
        link_bytes: that a device sends in a step: "attention", "mlp" (dense ones and shared
            experts), "experts", "words" (embedding, head, logits), "kernels" (FSDP's gathers).

    >>> half = Placement(2, 8, 2, weight_bytes=60, cache_bytes=40, link_bytes={})
    >>> half.bytes
    100
    """

    devices: int
    batch_size: int
    row_parts: int
    weight_bytes: int
    cache_bytes: int
    link_bytes: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """Weights and cache of a device."""
        return self.weight_bytes + self.cache_bytes

    def rows_that_fit(self, memory_bytes: float, share: float = 0.9) -> int:
        """Rows of all devices that fit beside the weights, in a share of each device's memory.

        >>> half = Placement(2, 8, 2, weight_bytes=60, cache_bytes=40, link_bytes={})
        >>> half.rows_that_fit(200)  # 120 bytes are left, and four rows take 40
        24
        """
        row = self.cache_bytes * self.row_parts / self.batch_size
        left = share * memory_bytes - self.weight_bytes
        return max(0, int(left // row)) * self.row_parts


def placement(
    config: DecoderConfig,
    *,
    mesh: Mapping[str, int],
    sharding: Rules,
    batch_size: int,
    length: int,
    queries: int = 1,
    dtype="bfloat16",
) -> Placement:
    """What a decode step of a model costs each device of a mesh.

    Args:
        config: of the model.
        mesh: sizes of its axes.
        sharding: what they split.
        batch_size: B, rows.
        length: S, slots of a row.
        queries: T, new tokens of a row.
        dtype: of weights, activations and cache.

    Raises:
        ValueError: sizes that do not divide over the mesh, or axes that it does not have.
        NotImplementedError: a model with sparse attention or with shortcuts, whose layers move
            other things.

    >>> config = DecoderConfig.from_preset("deepseek_v3")
    >>> both = ("data", "model")
    >>> rules = Rules(B=both, N="model", F="model", W="model", E=both)
    >>> found = placement(config, mesh={"data": 8, "model": 8}, sharding=rules,
    ...                   batch_size=512, length=8192)
    >>> round(found.weight_bytes / 1e9, 1), round(found.cache_bytes / 1e9, 1)
    (26.7, 4.6)
    >>> found.rows_that_fit(95e9)
    6528
    """
    for name, other in (("index_topk", config.attention.index_topk), ("shortcut", config.shortcut)):
        if other:
            raise NotImplementedError(
                f"{name}={other}: what such a layer moves between devices is not counted."
            )
    rules: Any = sharding  # whose letters are tuples once they are made
    axes = (jax.sharding.AxisType.Explicit,) * len(mesh)
    devices = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=axes)
    dtype = jnp.dtype(dtype)

    def made():
        model = Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        return nnx.state(model), model.init_cache(batch_size, length)

    state, cache = jax.eval_shape(made)
    links = _Links(config, devices, sharding, batch_size * queries, dtype.itemsize)
    return Placement(
        devices=devices.size,
        batch_size=batch_size,
        row_parts=places.count(devices, rules.B),
        weight_bytes=_held(state, sharding.of(state, devices)),
        cache_bytes=_held(cache.stores, sharding.of(cache, devices).stores),
        link_bytes=links.all() | {"kernels": _kernels(state, sharding, devices)},
    )


def _held(tree: Any, spots: Any) -> int:
    """Bytes of one device's part."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(spots), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def _kernels(state: Any, rules: Any, mesh: Any) -> float:
    """What FSDP gathers of kernels: over those axes of D that rows are split over too."""
    kept = places.without(rules.D, rules.B)
    gathered = dataclasses.replace(rules, D=kept)
    return float(_held(state, gathered.of(state, mesh)) - _held(state, rules.of(state, mesh)))


@dataclasses.dataclass(frozen=True)
class _Links:
    config: DecoderConfig
    mesh: Any
    rules: Any  # Rules, whose letters are tuples once they are made
    tokens: int
    width: int

    def all(self) -> dict[str, float]:
        """By part of the model, of all layers."""
        config = self.config
        layers = config.attention.num_hidden_layers
        sparse = sum(config.is_sparse(layer) for layer in range(layers))
        gated = layers if config.n_shared_experts else layers - sparse
        return {
            "attention": layers * self._attention(),
            "mlp": gated * self._there_and_back(self.rules.F),
            "experts": sparse * self._experts(),
            "words": self._words(),
        }

    def _count(self, axes: Axes) -> int:
        return places.count(self.mesh, axes)

    def _rows(self) -> float:
        return self.tokens / self._count(self.rules.B)

    def _split(self, axes: Axes) -> tuple[int, int]:
        """Shared and other parts of a letter's axes."""
        other = places.without(axes, self.rules.B)
        return self._count(places.without(axes, other)), self._count(other)

    def _gather(self, axes: Axes, numbers: float) -> float:
        """Rows, each of so many numbers, to where a letter's shared axes want them."""
        return (self._split(axes)[0] - 1) * self._rows() * numbers * self.width

    def _sums(self, axes: Axes, numbers: float) -> float:
        """Sums over a letter's axes: scattered to the rows, and added up over the other parts."""
        _, other = self._split(axes)
        rest = 2 * self._rows() * numbers * self.width * (other - 1) / other
        return self._gather(axes, numbers) + rest

    def _there_and_back(self, axes: Axes) -> float:
        width = self.config.attention.hidden_size
        return self._gather(axes, width) + self._sums(axes, width)

    def _attention(self) -> float:
        config, rules = self.config.attention, self.rules
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        shared, other = self._split(rules.N)
        entering = self._queries()
        sums = self._sums(rules.N, config.hidden_size)
        each = self._rows() * config.num_attention_heads * self.width
        moved = each / other * (2 * rank + rope) * (shared - 1) / shared  # to rows and back
        slots, split = self._count(rules.S), places.without(rules.N, rules.B, rules.S)
        if slots > 1:
            own, lse = each / self._count(split), 4 / self.width
            joint = self._count(places.without(rules.N, rules.B, split))
            moved += own * (rank + rope) * (joint - 1) / joint
            moved += own * (rank + lse) * (slots - 1) / slots
            if joint < slots:
                moved += own * rank * (slots - 1) / slots
        return entering + moved + sums

    def _queries(self) -> float:
        """What q_b_proj takes, or q_proj: to all heads."""
        config, rules = self.config.attention, self.rules
        if config.q_lora_rank is None or not rules.A:
            return self._gather(rules.N, config.q_lora_rank or config.hidden_size)
        shared, other = self._split(rules.A)
        row = self._rows() * self.width
        inputs = row * config.hidden_size / other * (shared - 1) / shared
        parts = shared * other
        return inputs + 2 * shared * row * config.q_lora_rank * (parts - 1) / parts

    def _experts(self) -> float:
        chosen, width = self.config.num_experts_per_tok, self.config.attention.hidden_size
        peers, other = self._split(self.rules.E)
        choices = (peers - 1) * self._rows() * chosen * 8
        sums = 2 * self._rows() * width * self.width * (other - 1) / other
        if peers <= chosen:
            return self._gather(self.rules.E, 2 * width) + choices + sums
        return 2 * chosen * self._rows() * width * self.width + choices + sums

    def _words(self) -> float:
        words = self.config.vocab_size
        parts = self._count(self.rules.W)
        logits = 4 * self._rows() * words * (parts - 1) / parts
        return self._there_and_back(self.rules.W) + logits
