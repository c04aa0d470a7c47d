"""The decoder of DeepSeek-V2 and V3, and of the models that share its shape.

Embedding, layers of x + attention(norm(x)) and x + mlp(norm(x)), final norm, head. The first
layers' MLPs are dense and gated; the others' are mixtures of experts: a float32 router scores all
experts, each token goes to its best few, and a shared expert sees every token. By their configs:
DeepSeek-V2, V3 and R1, Kimi-K2, Moonlight, GLM-4.7-Flash, Youtu-LLM, A.X-K1, Sarvam and MiniCPM3.

A `MultiTokenPredictor` may come with the model: one more block, which guesses a token further and
so drafts for speculative decoding (`generation.generate`).

The layers are a Python loop, not a scan: a scan would slice each layer's experts out of one stacked
array, and XLA copies such a slice before a library's matmul reads it, doubling what a decode step
moves.

Letters: B batch, T tokens, D hidden size, W words.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.cache import LatentCache
from mla_jax.models.block import Block
from mla_jax.models.config import DecoderConfig
from mla_jax.models.predictor import MultiTokenPredictor


class Decoder(nnx.Module):
    """A language model of DeepSeek's shape.

    Args:
        config: its shape.
        mtp: with the block for multi-token prediction, as `predictor`; else that is None.
        dtype, param_dtype, precision, implementation, rngs: as in `MultiHeadLatentAttention`. The
            router's parameters are float32 whatever param_dtype says.

    Raises:
        ValueError: mtp for a config without one such block; when called, tokens that are not
            integers [B T], or a cache of another depth.

    >>> import mla_jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from mla_jax.models import DecoderConfig, Decoder
    >>> model = Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        mtp: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if mtp and config.num_nextn_predict_layers != 1:
            raise ValueError(
                f"num_nextn_predict_layers={config.num_nextn_predict_layers}: mtp needs a model "
                "with one block for multi-token prediction; without mtp, draft by prompt lookup."
            )
        width = config.attention.hidden_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(width**-0.5), **types
        )
        cores = {"precision": precision, "implementation": implementation, **types}
        self.blocks = nnx.List(
            Block(config, layer, **cores) for layer in range(config.attention.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        tied = config.tie_word_embeddings
        head = {"use_bias": False, "precision": precision, **types}
        self.head = None if tied else nnx.Linear(width, config.vocab_size, **head)
        self.predictor = MultiTokenPredictor(config, **cores) if mtp else None

    def __call__(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T W"]:
        """Logits [B T W] in float32, without a cache; options as in the layer's `__call__`."""
        x = self._embed(tokens)
        for block in self.blocks:
            y = block.attention(block.attention_norm(x), **options)
            x = block.feed_forward(block.add(x, y))
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
        x, cache = self._hidden(tokens, cache, lengths)
        return self._logits(x), cache

    def prefill_last(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"],
        *,
        empty: bool = False,
    ) -> tuple[Float[Array, "B W"], tuple[LatentCache, ...]]:
        """`prefill` with the logits of each row's last token only: a prompt's are often too many.

        A row of length 0 gives logits that mean nothing. `empty` is the layer's.
        """
        x, cache = self._hidden(tokens, cache, lengths, empty)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self._logits(jnp.take_along_axis(x, last, axis=1))[:, 0], cache

    def decode(
        self, tokens: Int[Array, "B T"], cache: tuple[LatentCache, ...]
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends T new tokens to every row: see `MultiHeadLatentAttention.decode`."""
        x, cache = self._hidden(tokens, cache, None)
        return self._logits(x), cache

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"] | None = None,
        *,
        empty: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[LatentCache, ...]]:
        """`prefill`, or without lengths `decode`, up to the head: states after the final norm."""
        x, cache = self._hidden(tokens, cache, lengths, empty)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Logits in float32 from the states that `extend` gives."""
        return self._words(hidden, self.head)

    def init_draft_cache(self, batch_size: int, max_length: int, dtype=None) -> LatentCache:
        """An empty cache of the predictor's block."""
        return self._predictor().block.attention.init_cache(batch_size, max_length, dtype)

    def draft(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        cache: LatentCache,
        lengths: Int[Array, "B"] | None = None,
        *,
        empty: bool = False,
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """The predictor on T positions of every row: see `MultiTokenPredictor`.

        Args:
            hidden: states of these positions, from `extend`; or from `draft`, of those before.
            tokens: the ones that come after these positions.
            cache: of the predictor.
            lengths: positions that count, in each row; None is T for all.
            empty: as in the layer's `prefill`.

        Returns:
            states for `draft_logits`, and the new cache.
        """
        predictor = self._predictor()
        embedded = self._embed(tokens, predictor.embed)
        return predictor.extend(hidden, embedded, cache, lengths, empty)

    def draft_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Logits in float32 from the states that `draft` gives."""
        predictor = self._predictor()
        return self._words(hidden, predictor.head or self.head)

    def _predictor(self) -> MultiTokenPredictor:
        if self.predictor is None:
            raise ValueError(
                "this model has no block for multi-token prediction: make it with mtp=True, or "
                "load it by checkpoint.load_decoder(..., mtp=True)."
            )
        return self.predictor

    def _hidden(self, tokens, cache, lengths, empty=False):
        if len(cache) != len(self.blocks):
            raise ValueError(
                f"cache has {len(cache)} layers, the model {len(self.blocks)}: make it with "
                "model.init_cache()."
            )
        x, new, schedule = self._embed(tokens), [], None
        if lengths is None:
            schedule = self.blocks[0].attention.decode_schedule(cache[0], tokens.shape[1])
        for block, held in zip(self.blocks, cache, strict=True):
            x, held = block.extend(x, held, lengths, schedule, empty)
            new.append(held)
        return x, tuple(new)

    def _embed(self, tokens, embed: nnx.Embed | None = None):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B T]."
            )
        x = (embed or self.embed)(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def _logits(self, x):
        return self.logits(self.norm(x))

    def _words(self, hidden, head: nnx.Linear | None):
        with jax.named_scope("head"):
            logits = self.embed.attend(hidden) if head is None else head(hidden)
            return logits.astype(jnp.float32) * self.config.logit_scale
