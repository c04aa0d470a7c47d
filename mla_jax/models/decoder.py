"""The decoder of DeepSeek-V2 and V3, and of the models that share its shape.

Embedding, layers of x + attention(norm(x)) and x + mlp(norm(x)), final norm, head. The first
layers' MLPs are dense and gated; the others' are mixtures of experts: a float32 router scores all
experts, each token goes to its best few, and a shared expert sees every token. By their configs:
DeepSeek-V2, V3, R1 and V3.2, Kimi-K2, Moonlight, GLM-4.7-Flash, GLM-5, Youtu-LLM, A.X-K1, Sarvam
and MiniCPM3; with layers of its own (`models.longcat`) LongCat-Flash.

A `MultiTokenPredictor` may come with the model: one more block, which guesses a token further and
so drafts for speculative decoding (`generation.generate`).

The layers are a Python loop, not a scan: a scan would slice each layer's experts out of one stacked
array, and XLA copies such a slice before a library's matmul reads it, doubling what a decode step
moves.

Letters: B batch, T tokens, D hidden size, W words.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax import sharding
from mla_jax.cache import Cache
from mla_jax.layers.experts import MixtureOfExperts, Routing, balance_bias
from mla_jax.layers.norm import RMSNorm
from mla_jax.layers.projection import kernel_of
from mla_jax.layers.remat import Save, rematerialised
from mla_jax.layers.step import Step
from mla_jax.models.block import Block
from mla_jax.models.config import DecoderConfig
from mla_jax.models.longcat import ShortcutBlock
from mla_jax.models.predictor import MultiTokenPredictor
from mla_jax.ops import dense, dispatch, embedding
from mla_jax.ops.cross_entropy import linear_cross_entropy, mean_linear_cross_entropy
from mla_jax.plain import Plain, Ready, Whole
from mla_jax.sharding import Rules

_HEAD = dense.linear("D", "W", plain=True)

Lengths = Int[Array, "B"] | Plain


class Decoder(nnx.Module):
    """A language model of DeepSeek's shape.

    Args:
        config: its shape.
        mtp: with the block for multi-token prediction, as `predictor`; else that is None.
        dtype, param_dtype, precision, implementation, rngs: as in `MultiHeadLatentAttention`. The
            router's parameters are float32 whatever param_dtype says.

    Raises:
        ValueError: mtp for a config without one such block; when called, tokens that are not
            integers [B T], or a cache of another model.

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
        implementation: dispatch.Implementation = None,
        rngs: nnx.Rngs,
    ):
        if mtp and config.num_nextn_predict_layers != 1:
            raise ValueError(
                f"num_nextn_predict_layers={config.num_nextn_predict_layers}: mtp needs a model "
                "with one block for multi-token prediction; without mtp, draft by prompt lookup."
            )
        width = config.attention.hidden_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, self.precision = config, precision
        self.embed = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(width**-0.5),
            embedding_metadata=sharding.metadata("W", "D"), **types,
        )  # fmt: skip
        cores = {"precision": precision, "implementation": implementation, **types}
        block = ShortcutBlock if config.shortcut else Block
        self.blocks = nnx.List(
            block(config, layer, **cores) for layer in range(config.attention.num_hidden_layers)
        )
        self.norm = RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        tied = config.tie_word_embeddings
        head: dict[str, Any] = {"use_bias": False, "precision": precision, **_HEAD, **types}
        self.head = None if tied else nnx.Linear(width, config.vocab_size, **head)
        self.predictor = MultiTokenPredictor(config, **cores) if mtp else None
        # What config.json says of weights that are kept as they were stored, as JSON.
        self.quantization: str | None = None

    def __call__(
        self, tokens: Int[Ready, "B T"], *, remat: Save | None = None, **options: Any
    ) -> Float[Array, "B T W"]:
        """Logits [B T W] in float32, without a cache; arguments as in `states`."""
        return self.logits(self.states(tokens, remat=remat, **options))

    def states(
        self, tokens: Int[Ready, "B T"], *, remat: Save | None = None, **options: Any
    ) -> Float[Array, "B T D"]:
        """States after the final norm, without a cache: training and scoring.

        Args:
            tokens: int [B T].
            remat: what every layer's backward pass finds, computing the rest again: see
                `mla_jax.remat_policy`. None keeps everything.
            options: as in the layer's `__call__`.
        """
        x, relay = self._embed(tokens), None
        for block in self.blocks:
            x, relay = rematerialised(block.attend, remat)(x, relay, **options)
        return self.norm(x)

    def states_with_routing(
        self, tokens: Int[Ready, "B T"], *, remat: Save | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], tuple[Routing, ...]]:
        """The same, and what the router of each layer with experts did.

        Options are also `valid`, bool [B T]: tokens that count for load and balance.
        """
        x, relay, routings = self._embed(tokens), None, []
        for block in self.blocks:
            x, relay, routing = rematerialised(block.with_routing, remat)(x, relay, **options)
            routings += [] if routing is None else [routing]
        return self.norm(x), tuple(routings)

    def losses(
        self, hidden: Float[Array, "B T D"], labels: Int[Ready, "B T"], *, chunk: int = 2048
    ) -> Float[Array, "B T"]:
        """Cross-entropy of every token in nats, from its states and the token that came next.

        The logits never exist for more than `chunk` tokens: see `mla_jax.linear_cross_entropy`.
        """
        return self._cross_entropy(linear_cross_entropy, hidden, labels, self.head, chunk=chunk)

    def loss(
        self,
        hidden: Float[Array, "B T D"],
        labels: Int[Ready, "B T"],
        counted: Bool[Array, "B T"] | None = None,
        *,
        chunk: int = 2048,
    ) -> Float[Array, ""]:
        """The mean of `losses` over the tokens that count: `mla_jax.mean_linear_cross_entropy`."""
        more = {"counted": counted, "chunk": chunk}
        return self._cross_entropy(mean_linear_cross_entropy, hidden, labels, self.head, **more)

    def indexer_loss(
        self, tokens: Int[Ready, "B T"], *, warmup: bool = False, **options: Any
    ) -> Float[Array, ""]:
        """What the indexers of sparse attention learn from: the mean over the layers that have one.

        Only their parameters have a gradient. DeepSeek-V3.2 (arXiv 2512.02556, section 2.1) trains
        them in two stages: first beside dense attention with all else frozen (`warmup`, and the
        model is called with dense=True), then beside sparse attention with the model's own loss.

        Args:
            tokens: int [B T].
            warmup: attention to all tokens is the target, and what the layers compute.
            options: as in the layer's `__call__`, but for form and dense.

        Raises:
            ValueError: no layer has an indexer.
        """
        x, relay, losses = self._embed(tokens), None, []
        for block in self.blocks:
            losses += block.indexer_losses(x, warmup=warmup, **options)
            x, relay = block.attend(x, relay, dense=warmup, **options)
        if not losses:
            raise ValueError("index_topk=None: no layer of this model has an indexer.")
        return jnp.stack(losses).mean()

    def init_cache(
        self,
        batch_size: Whole,
        max_length: Whole,
        dtype=None,
        pages: Whole | None = None,
        sharding: Rules | None = None,
    ) -> Cache:
        """An empty cache of all layers: see `Cache.init`."""
        mixers = [mixer for block in self.blocks for mixer in block.mixers]
        return Cache.init(mixers, batch_size, max_length, dtype, pages, sharding)

    def extend(
        self, tokens: Int[Ready, "B T"], cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends `lengths[b]` of T tokens to row b, all of them where that is None.

        Args:
            tokens: int [B T], rows right-padded.
            cache: of `init_cache`, B rows.
            lengths: int [B], 0 to T.

        Returns:
            states [B T D] after the final norm, meaningless past a row's length, and the new cache.

        Raises:
            ValueError: arguments that do not go together, or, outside jit, a row that would
                overflow (under jit its `overflowed` is set).
        """
        x = self._embed(cache.beside(tokens))
        mixers = sum(len(block.mixers) for block in self.blocks)
        if len(cache.stores) != mixers or cache.batch_size != tokens.shape[0]:
            raise ValueError(
                f"cache has {len(cache.stores)} stores of {cache.batch_size} rows: the model has "
                f"{mixers}, the tokens {tokens.shape[0]} rows: make it with model.init_cache()."
            )
        step, relay = Step.begin(cache, tokens.shape[1], lengths), None
        step = dataclasses.replace(step, copies=dense.copies(x))
        if step.copies > 1:  # behind the barrier XLA does not see that they are copies
            x = jax.lax.optimization_barrier(step.copied(x))
        held, stores = iter(cache.stores), []
        for block in self.blocks:
            own = tuple(next(held) for _ in block.mixers)
            x, own, relay = block.extend(x, own, step, relay)
            stores += own
        return step.own(self.norm(x)), cache.end(stores, step)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """Logits in float32 from the states that `extend` gives."""
        return self._words(hidden, self.head)

    def prefill(
        self, tokens: Int[Ready, "B T"], cache: Cache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B T W"], Cache]:
        """`extend` with the logits of all tokens, [B T W]."""
        hidden, cache = self.extend(tokens, cache, lengths)
        return self.logits(hidden), cache

    def prefill_last(
        self, tokens: Int[Ready, "B T"], cache: Cache, lengths: Int[Array, "B"]
    ) -> tuple[Float[Array, "B W"], Cache]:
        """`extend` with the logits of each row's last token only: a prompt's are often too many.

        A row of length 0 gives logits that mean nothing.
        """
        hidden, cache = self.extend(tokens, cache, lengths)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0], cache

    def decode(
        self, tokens: Int[Ready, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T W"], Cache]:
        """`prefill` with T tokens for every row."""
        return self.prefill(tokens, cache)

    def init_draft_cache(
        self,
        batch_size: Whole,
        max_length: Whole,
        dtype=None,
        pages: Whole | None = None,
        sharding: Rules | None = None,
    ) -> Cache:
        """An empty cache of the predictor's block."""
        mixers = self._predictor().block.mixers
        return Cache.init(mixers, batch_size, max_length, dtype, pages, sharding)

    def draft(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Ready, "B T"],
        cache: Cache,
        lengths: Lengths | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The predictor on T positions of every row: see `MultiTokenPredictor`.

        Args:
            hidden: states of these positions, from `extend`; or from `draft`, of those before.
            tokens: the ones that come after these positions.
            cache: of the predictor.
            lengths: positions that count, in each row; None is T for all.

        Returns:
            states for `draft_logits`, and the new cache.
        """
        predictor = self._predictor()
        embedded = self._embed(cache.beside(tokens), predictor.embed)
        return predictor.extend(hidden, embedded, cache, lengths)

    def draft_logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """Logits in float32 from the states that `draft` gives."""
        predictor = self._predictor()
        return self._words(hidden, predictor.head or self.head)

    def draft_states(
        self, hidden: Float[Array, "B T D"], tokens: Int[Ready, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """`draft` without a cache, and what the block's router did: training.

        Args:
            hidden: the model's states of these positions.
            tokens: the ones that come after these positions.
            options: as in `states_with_routing`.
        """
        predictor = self._predictor()
        return predictor(hidden, self._embed(tokens, predictor.embed), **options)

    def draft_loss(
        self,
        hidden: Float[Array, "B T D"],
        labels: Int[Ready, "B T"],
        counted: Bool[Array, "B T"] | None = None,
        *,
        chunk: int = 2048,
    ) -> Float[Array, ""]:
        """`loss` from the states that `draft_states` gives and the tokens next but one."""
        head, more = self._predictor().head or self.head, {"counted": counted, "chunk": chunk}
        return self._cross_entropy(mean_linear_cross_entropy, hidden, labels, head, **more)

    def balance(self, load: Int[Array, "L E"], *, rate: float = 1e-3) -> None:
        """Moves all routers' biases by their loads, in place: see `layers.experts.balance_bias`.

        Args:
            load: of a whole training step, a row for each layer with experts, the block for
                multi-token prediction last.
            rate: by how much.

        Raises:
            ValueError: another number of rows, or routers without a bias.
        """
        blocks = [*self.blocks, *([] if self.predictor is None else [self.predictor.block])]
        routers = [b.mlp.router for b in blocks if isinstance(b.mlp, MixtureOfExperts)]
        biased = self.config.has_selection_bias
        if not biased or len(load) != len(routers):
            raise ValueError(
                f"load has {len(load)} rows: this model has {len(routers)} routers "
                f"{'with' if biased else 'without'} a bias (has_selection_bias={biased})."
            )
        for router, own in zip(routers, load, strict=True):
            router.bias.set_value(balance_bias(router.bias[...], own, rate=rate))

    def _predictor(self) -> MultiTokenPredictor:
        if self.predictor is None:
            raise ValueError(
                "this model has no block for multi-token prediction: make it with mtp=True, or "
                "load it by checkpoint.load_decoder(..., mtp=True)."
            )
        return self.predictor

    def _embed(self, tokens, embed: nnx.Embed | None = None):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B T]."
            )
        words = self.config.vocab_size
        if not isinstance(tokens, jax.core.Tracer):
            known = np.asarray(tokens)
            wrong = known[(known < 0) | (known >= words)]
            if wrong.size:
                raise ValueError(
                    f"tokens has {wrong[0]}: the model has {words} words. Is the tokenizer this "
                    "model's? Padding may be any of its tokens."
                )
        # Under jit nothing can be raised: a token that does not exist becomes NaN, never another.
        table = embed or self.embed
        if sharding.mesh_of(table.embedding[...], tokens) is None:
            x = table(jnp.where(tokens < 0, jnp.full_like(tokens, words), tokens))
        else:
            x = embedding.embed(table.embedding[...].astype(table.dtype), tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def _cross_entropy(self, function, hidden, labels, head, **more):
        if head is None:
            kernel, dtype = self.embed.embedding[...].T, self.embed.dtype
        else:
            words = (self.config.vocab_size,)
            kernel, dtype = kernel_of(head, hidden.shape[-1], words), self.embed.dtype
        dtype = dtype or jnp.promote_types(hidden.dtype, kernel.dtype)
        more |= {"scale": self.config.logit_scale, "precision": self.precision}
        return function(hidden.astype(dtype), kernel, labels, **more)

    def _words(self, hidden, head: nnx.Linear | None):
        with jax.named_scope("head"):
            logits = self._tied(hidden) if head is None else head(hidden)
            return logits.astype(jnp.float32) * self.config.logit_scale

    def _tied(self, hidden):
        table = self.embed.embedding[...]
        if sharding.mesh_of(hidden, table) is None:
            return self.embed.attend(hidden)
        hidden, table = self.embed.promote_dtype((hidden, table), dtype=self.embed.dtype)
        product = dense.Product(("W", "D"), plain=True)
        return product(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))
