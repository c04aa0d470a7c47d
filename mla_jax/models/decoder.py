"""A small decoder: embedding, blocks of RMSNorm + MLA + gated MLP, final norm, tied head.

What `mla-jax demo` trains, and an example of the layer in a model.

Letters: B batch, T tokens, D hidden size, F intermediate size, W words of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax.attention import MultiHeadLatentAttention
from mla_jax.cache import LatentCache
from mla_jax.config import MLAConfig
from mla_jax.ops import dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a `Decoder`.

    Attributes:
        attention: of every layer; its hidden_size and num_hidden_layers are the model's.
        vocab_size: W, words.
        intermediate_size: F, width of the gated MLP.
        rms_norm_eps: epsilon of the norms around attention and MLP.

    Raises:
        ValueError: a width that is not a positive whole number.

    >>> config = DecoderConfig(attention=MLAConfig.from_preset("tiny"))
    >>> config.vocab_size, config.intermediate_size
    (256, 341)
    """

    attention: MLAConfig
    vocab_size: int = 256
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 8 * self.attention.hidden_size // 3)
        for key in ("vocab_size", "intermediate_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r}: {key} must be a positive whole number.")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP gated by SiLU (arXiv 2002.05202)."""

    def __init__(
        self, config: DecoderConfig, *, dtype, param_dtype, precision, implementation, rngs
    ):
        width = config.attention.hidden_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def norm():
            return nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)

        def linear(inputs, outputs):
            return nnx.Linear(
                inputs, outputs, use_bias=False, precision=precision,
                dot_general=dense.dot_general, **types,
            )  # fmt: skip

        self.attention_norm = norm()
        self.attention = MultiHeadLatentAttention(
            config.attention, precision=precision, implementation=implementation, **types
        )
        self.mlp_norm = norm()
        self.gate_proj = linear(width, config.intermediate_size)
        self.up_proj = linear(width, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, width)

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The gated MLP with its norm and residual."""
        hidden = self.mlp_norm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Decoder(nnx.Module):
    """A decoder-only language model on Multi-head Latent Attention.

    Args:
        config: its shape.
        dtype, param_dtype, precision, implementation, rngs: as in `MultiHeadLatentAttention`.

    Raises:
        ValueError: when called, tokens that are not integers [B T], or a cache of another depth.

    >>> import mla_jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> config = DecoderConfig(attention=mla_jax.MLAConfig.from_preset("tiny"))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        width = config.attention.hidden_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(width**-0.5), **types
        )
        self.blocks = nnx.List(
            Block(config, precision=precision, implementation=implementation, **types)
            for _ in range(config.attention.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Logits [B T W] in float32, without a cache; arguments as in the layer's `__call__`."""
        x = self._embed(tokens)
        for block in self.blocks:
            hidden = block.attention_norm(x)
            x = block.mlp(
                x + block.attention(
                    hidden, positions=positions, segment_ids=segment_ids, mask=mask
                )
            )  # fmt: skip
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int, dtype=None) -> tuple[LatentCache, ...]:
        """An empty cache per layer: see `MultiHeadLatentAttention.init_cache`."""
        return tuple(
            block.attention.init_cache(batch_size, max_length, dtype) for block in self.blocks
        )

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends `lengths[b]` tokens to row b: see `MultiHeadLatentAttention.prefill`.

        Returns:
            logits [B T W], meaningless past a row's length, and the new caches.
        """
        return self._cached(tokens, cache, lambda layer, x, held: layer.prefill(x, held, lengths))

    def decode(
        self, tokens: Int[Array, "B T"], cache: tuple[LatentCache, ...]
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends T new tokens to every row: see `MultiHeadLatentAttention.decode`."""
        # One cut of the batch for all layers, whose caches are equally long.
        schedule = None
        if cache and tokens.ndim == 2:
            schedule = self.blocks[0].attention.decode_schedule(cache[0], tokens.shape[1])
        return self._cached(
            tokens, cache, lambda layer, x, held: layer.decode(x, held, schedule=schedule)
        )

    def _cached(self, tokens, cache, attend):
        if len(cache) != len(self.blocks):
            raise ValueError(
                f"cache has {len(cache)} layers, the model {len(self.blocks)}: make it with "
                "model.init_cache()."
            )
        x, new = self._embed(tokens), []
        for block, held in zip(self.blocks, cache, strict=True):
            y, held = attend(block.attention, block.attention_norm(x), held)
            x = block.mlp(x + y)
            new.append(held)
        return self._logits(x), tuple(new)

    def _embed(self, tokens):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B T]."
            )
        return self.embed(tokens)

    def _logits(self, x):
        return self.embed.attend(self.norm(x)).astype(jnp.float32)
