"""A model whose arrays were taken out once, for loops in Python that call it at every step.

jit takes a model apart at every call: for an nnx model of 27 layers that is several hundred arrays
behind as many Python objects, and takes longer than a step of a small model. A `Bound` holds the
arrays in a plain tuple, and what they were taken from as one object, which is hashed once and
mostly compared by identity.

Letters: B batch rows, T tokens, D hidden size, W words of the vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax import target
from mla_jax.cache import PAGE, Cache
from mla_jax.layers.attention import MultiHeadLatentAttention
from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.plain import Plain
from mla_jax.sharding import Rules


class _Structure:
    """The structure of a model's tree: a static argument of jit.

    It is hashed once, so that a call does not hash the model, and mostly compared by identity.
    """

    def __init__(self, tree: Any):
        self.tree, self._hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Structure) and self.tree == other.tree


def _ready(model: Any) -> Any:
    """The model that is bound: on a GPU a copy that also keeps what its kernels take.

    These are W_UK and W_UV of attention layers, and a router's kernel in the order of its product.
    """
    if target.current().platform != "gpu" or not isinstance(model, nnx.Module):
        return model
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, the same arrays
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadLatentAttention | MixtureOfExperts):
            module.keep_parts()
    return model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """Jitted steps of a model, as `bind` makes them. The cache is donated in all of them.

    What has `prefill` and `decode`, as a single layer has, is called by these; of what has `extend`
    and `logits` alone they are made.

    >>> import jax.numpy as jnp, mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> step = Bound.of(layer)
    >>> y, cache = step.prefill(jnp.ones((2, 5, 128)), step.init_cache(2, 8), jnp.array([5, 3]))
    >>> y, cache = step.decode(jnp.ones((2, 1, 128)), cache)
    >>> cache.length
    Array([6, 4], dtype=int32)
    """

    leaves: tuple[Any, ...]
    structure: _Structure = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, model: Any) -> "Bound":
        """See `bind`."""
        if isinstance(model, Bound):
            return model
        leaves, tree = jax.tree.flatten(_ready(model))
        for leaf in leaves:
            if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
                raise TypeError(
                    f"model has {type(leaf).__name__} {leaf!r:.80}, which is no array: it must be "
                    "an nnx.Module or another pytree of arrays."
                )
        return cls(tuple(leaves), _Structure(tree))

    @property
    def model(self) -> Any:
        """The model as it was when it was bound; on a GPU with what `bind` keeps beside it."""
        return jax.tree.unflatten(self.structure.tree, self.leaves)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        dtype=None,
        pages: int | None = None,
        sharding: Rules | None = None,
    ) -> Cache:
        """The model's `init_cache`."""
        options = {"dtype": dtype, "pages": pages, "sharding": sharding}
        given = {name: value for name, value in options.items() if value is not None}
        return self.model.init_cache(batch_size, max_length, **given)

    def prefill(
        self, x: Int[Array, "B T"] | Float[Array, "B T D"] | Plain, cache: Cache, lengths=None
    ) -> tuple[Float[Array, "B T W"] | Float[Array, "B T D"], Cache]:
        """Appends `lengths[b]` of T tokens to row b; None is T for all.

        Args:
            x: tokens [B T] of a model, activations [B T D] of a layer; rows right-padded.
            cache: of `init_cache`; invalid afterwards.
            lengths: int [B].

        Returns:
            logits [B T W] of a model, outputs [B T D] of a layer, and the new cache. A row that
            overflows has `overflowed` set: jit cannot raise.
        """
        return _prefill(self, _array(x), cache, None if lengths is None else _array(lengths))

    def decode(
        self, x: Int[Array, "B T"] | Float[Array, "B T D"] | Plain, cache: Cache
    ) -> tuple[Float[Array, "B T W"] | Float[Array, "B T D"], Cache]:
        """`prefill` with T tokens for every row."""
        return _decode(self, _array(x), cache)

    def extend(
        self, tokens: Int[Array, "B T"] | Plain, cache: Cache, lengths=None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`prefill` that stops at the states: logits of some of them are `logits(states)`."""
        return _extend(self, _array(tokens), cache, None if lengths is None else _array(lengths))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """The model's `logits`."""
        return _logits(self, hidden)


def bind(model: Any) -> Bound:
    """Jitted steps of a model for a loop of one's own, at little cost for every call.

    It is a snapshot: what is changed on the model later, such as by training, is not seen. Bind it
    again then; that compiles nothing.

    On a GPU it also keeps W_UK and W_UV of every attention layer apart, because XLA would cut them
    out of kv_b_proj in every step. They are copies in the dtype of the computation and take as much
    memory as kv_b_proj does in it: in bfloat16 0.11 GB for DeepSeek-V2-Lite and 2 GB for
    DeepSeek-V3, whether weights are stored in 8 bits or not. Models on a mesh have no such copies.

    Args:
        model: a `models.Decoder`, a single layer, or a model of one's own that has
            `init_cache(batch, slots, dtype=None, pages=None)`,
            `extend(tokens, cache, lengths=None) -> (hidden, cache)` and `logits(hidden)`.

    Returns:
        a `Bound` with `prefill`, `decode`, `extend`, `logits` and `init_cache`. `generate` and
        `decode_loop` take it in place of the model, too.

    Raises:
        TypeError: a model that is no pytree of arrays.

    >>> import jax.numpy as jnp, mla_jax
    >>> from flax import nnx
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> attention = mla_jax.MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> step = mla_jax.bind(Decoder(DecoderConfig(attention=attention), rngs=nnx.Rngs(0)))
    >>> logits, cache = step.prefill(jnp.array([[3, 1, 4]]), step.init_cache(1, 8))
    >>> for _ in range(3):
    ...     logits, cache = step.decode(logits[:, -1:].argmax(-1), cache)
    >>> logits.shape, cache.length
    ((1, 1, 256), Array([6], dtype=int32))
    """
    return Bound.of(model)


def unbound(model: Any) -> Any:
    """The model of a `Bound`; any other as it is."""
    return model.model if isinstance(model, Bound) else model


def prefill(model: Any, x: Any, cache: Cache, lengths: Any = None) -> tuple[Any, Cache]:
    """`model.prefill`, made of `extend` and `logits` where there is none; not jitted."""
    model = unbound(model)
    if hasattr(model, "prefill"):
        return model.prefill(x, cache, lengths)
    hidden, cache = model.extend(x, cache, lengths)
    return model.logits(hidden), cache


def decode(model: Any, x: Any, cache: Cache) -> tuple[Any, Cache]:
    """`model.decode`, made of `extend` and `logits` where there is none; not jitted."""
    model = unbound(model)
    return model.decode(x, cache) if hasattr(model, "decode") else prefill(model, x, cache)


_jit = functools.partial(jax.jit, donate_argnames=("cache",))


@_jit
def _prefill(bound, x, cache, lengths):
    return prefill(bound, x, cache, lengths)


@_jit
def _decode(bound, x, cache):
    return decode(bound, x, cache)


@_jit
def _extend(bound, tokens, cache, lengths):
    return bound.model.extend(tokens, cache, lengths)


@jax.jit
def _logits(bound, hidden):
    return bound.model.logits(hidden)


def _array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else np.asarray(x)


@functools.lru_cache(maxsize=32)
def _shapes(structure, leaves) -> Any:
    def run(bound):
        model = bound.model
        tokens = jnp.zeros((1, 1), jnp.int32)
        hidden, _ = model.extend(tokens, model.init_cache(1, PAGE), jnp.ones((1,), jnp.int32))
        return model.logits(hidden), hidden

    return jax.eval_shape(run, Bound(leaves, structure))


def output_shape(bound: Bound) -> Any:
    """Logits [1 1 W] and states [1 1 D] of a model, as shapes."""
    struct = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))  # noqa: E731
    return _shapes(bound.structure, tuple(map(struct, bound.leaves)))
