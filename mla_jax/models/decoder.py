"""A small decoder language model around `MultiHeadLatentAttention`, from the public layer alone.

    tokens [B T] -- embed_tokens --> x [B T D]
    num_hidden_layers times  x += self_attn(input_layernorm(x))
                             x += mlp(post_attention_layernorm(x))
    norm(x) -- embed_tokens, transposed --> logits [B T W]

The wiring and the names are those of DeepSeek-V2's dense layers (arXiv 2405.04434) and of the
Hugging Face code. No experts: it is for the demo, for tests and to copy from.

Letters: B batch, T tokens, D hidden_size, I intermediate_size, W vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax.attention import MultiHeadLatentAttention
from mla_jax.cache import LatentCache
from mla_jax.config import MLAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Configuration of a `Decoder`.

    Attributes:
        attention: of every layer; its hidden_size is the model's.
        vocab_size: W, token ids are 0 to W-1.
        intermediate_size: I, inner width of the MLPs.
        num_hidden_layers: blocks; None takes attention.num_hidden_layers.
        rms_norm_eps: epsilon of the norms on the residual stream (those on the latents have
            attention.latent_norm_eps).

    Raises:
        ValueError: a field has a value it cannot have; the message names it.
    """

    attention: MLAConfig
    vocab_size: int
    intermediate_size: int
    num_hidden_layers: int | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        if not isinstance(self.attention, MLAConfig):
            raise ValueError(f"attention={self.attention!r}: it must be an MLAConfig.")
        if self.num_hidden_layers is None:
            object.__setattr__(self, "num_hidden_layers", self.attention.num_hidden_layers)
        for key in ("vocab_size", "intermediate_size", "num_hidden_layers"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key}={value!r}: {key} must be a positive whole number.")
        if not isinstance(self.rms_norm_eps, int | float) or not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps!r}: it must be a positive number.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or has an impossible value.
        """
        try:
            return cls(**{**fields, "attention": MLAConfig(**fields["attention"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the fields of a DecoderConfig: {error}") from error


class MLP(nnx.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)): SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, **options):
        options["use_bias"] = False
        self.gate_proj = nnx.Linear(width, inner, **options)
        self.up_proj = nnx.Linear(width, inner, **options)
        self.down_proj = nnx.Linear(inner, width, **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """[B T D] to [B T D]."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each on the normalized residual stream and added to it."""

    def __init__(self, config: DecoderConfig, *, implementation: str | None, **options):
        width = config.attention.hidden_size
        norm = {key: options[key] for key in ("dtype", "param_dtype", "rngs")}
        self.input_layernorm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **norm)
        self.self_attn = MultiHeadLatentAttention(
            config.attention, implementation=implementation, **options
        )
        self.post_attention_layernorm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **norm)
        self.mlp = MLP(width, config.intermediate_size, **options)

    def __call__(self, x: Float[Array, "B T D"], **options) -> Float[Array, "B T D"]:
        """[B T D] to [B T D]; options as of the attention."""
        return self._add_mlp(x + self.self_attn(self.input_layernorm(x), **options))

    def extend(
        self, x: Float[Array, "B T D"], cache: LatentCache, lengths: Int[Array, "B"] | None
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """The same for tokens behind those of the cache."""
        y, cache = self.self_attn.prefill(self.input_layernorm(x), cache, lengths)
        return self._add_mlp(x + y), cache

    def _add_mlp(self, x):
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """A causal language model: token ids in, logits out, one `LatentCache` per layer.

    Args:
        config: the sizes.
        dtype: of the computation; None is the parameters'.
        param_dtype: of the parameters.
        precision: of the matmuls, as in jax.lax.dot.
        implementation: backend of the attention core, as in `MultiHeadLatentAttention`.
        rngs: for the initializers; not kept.

    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=2)
    >>> config = DecoderConfig(attention=attention, vocab_size=256, intermediate_size=384)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> model(tokens).shape
    (2, 5, 256)
    >>> logits, cache = model.prefill(tokens, model.init_cache(batch_size=2, max_length=8))
    >>> logits, cache = model.decode(tokens[:, :1], cache)
    >>> logits.shape, cache[0].length
    ((2, 1, 256), Array([6, 6], dtype=int32))
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
        if not isinstance(config, DecoderConfig):
            raise ValueError(f"config={config!r}: it must be a DecoderConfig.")
        self.config = config
        self.precision = precision
        width, options = config.attention.hidden_size, {"dtype": dtype, "param_dtype": param_dtype}
        # Rows of norm 1, so that the tied head starts with logits of about 1.
        self.embed_tokens = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(width**-0.5),
            rngs=rngs, **options,
        )  # fmt: skip
        self.layers = nnx.List(
            Block(config, precision=precision, implementation=implementation, rngs=rngs, **options)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, **options)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Logits [B T W] of the token after each one, in float32; no cache: training and scoring.

        Args:
            tokens: integer ids [B T], 0 to W-1.
            positions, segment_ids, mask: as in `MultiHeadLatentAttention.__call__`.

        Raises:
            ValueError: tokens that are not integers [B T] or, outside jit, not words.
        """
        x = self._embed(tokens)
        for block in self.layers:
            x = block(x, positions=positions, segment_ids=segment_ids, mask=mask)
        return self._head(x)

    def init_cache(self, batch_size: int, max_length: int, dtype=None) -> tuple[LatentCache, ...]:
        """An empty cache per layer, `batch_size` rows of `max_length` slots each."""
        return tuple(
            block.self_attn.init_cache(batch_size, max_length, dtype) for block in self.layers
        )

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends `lengths[b]` tokens to row b, behind what the cache holds.

        Args:
            tokens: ids [B T], rows right-padded with anything.
            cache: of `init_cache`, one per layer.
            lengths: int [B], tokens of each row, 0 to T; None is T for all.

        Returns:
            logits [B T W] float32, zeros past a row's length, and the new cache.

        Raises:
            ValueError: as `__call__`; a cache that is not this model's; lengths out of 0..T; or,
                outside jit, a row that would overflow.
        """
        if not isinstance(cache, tuple | list) or len(cache) != len(self.layers):
            held = f"{len(cache)} of them" if isinstance(cache, tuple | list) else type(cache)
            raise ValueError(
                f"cache must be a tuple of {len(self.layers)} LatentCache, one per layer as "
                f"init_cache makes it, not {held}."
            )
        valid = None
        if lengths is not None and tokens.ndim == 2:
            valid = jnp.arange(tokens.shape[1])[None] < jnp.reshape(lengths, (-1, 1))
            tokens = jnp.where(valid, tokens, 0)  # padding need not be a word
        x, new = self._embed(tokens), []
        for block, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = block.extend(x, layer_cache, lengths)
            new.append(layer_cache)
        logits = self._head(x)
        return (logits if valid is None else jnp.where(valid[..., None], logits, 0)), tuple(new)

    def decode(
        self, tokens: Int[Array, "B T"], cache: tuple[LatentCache, ...]
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends T new tokens (1, or a few drafts) to every row: `prefill` without lengths."""
        return self.prefill(tokens, cache)

    def _embed(self, tokens):
        words = self.config.vocab_size
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be an integer array "
                "[B T] of token ids."
            )
        if not isinstance(tokens, jax.core.Tracer) and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= words:
                raise ValueError(
                    f"tokens go from {low} to {high}: ids must be 0 to vocab_size - 1 = {words - 1}."
                )
        with jax.named_scope("embed_tokens"):
            return self.embed_tokens(tokens)

    def _head(self, x):
        with jax.named_scope("lm_head"):
            x = self.norm(x)
            return jnp.einsum(
                "BTD,WD->BTW", x, self.embed_tokens.embedding[...].astype(x.dtype),
                precision=self.precision,
                preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
            )  # fmt: skip
