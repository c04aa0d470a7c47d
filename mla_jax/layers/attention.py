"""Multi-head Latent Attention as a Flax layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Every token becomes a latent (R numbers) and a rotary key (P numbers), shared by all heads; that is
all the cache holds. From one set of parameters two equal forms of the attention:

    expanded  keys and values per head are made from the latents, then ordinary attention;
    absorbed  W_UK is folded into the query, attention mixes latents, W_UV is applied once after.

    x [B T D]
    |- q_a_proj > q_a_norm > q_b_proj -+- q_nope [B T N H] -- w_uk --> pattern [B T N R]   per head
    |  (or q_proj)                     +- q_rope [B T N P] -- rope
    +- kv_a_proj -+- kv_a_norm ---------- latent [B T R]                                   shared
                  +- rope --------------- k_rope [B T P] --> cache
    latent_attention(pattern, q_rope, cache) -> out_latent [B T N R] -- w_uv --> heads [B T N V]
    heads -- sinks, gate -- o_proj --> y [B T D]

What only some families have (sinks, gates, query scales, more norms) is a line where it belongs in
this flow, switched on by the config.

Letters: B batch, T query tokens, S cache slots, N heads, D hidden size, Q q_lora_rank,
R kv_lora_rank, H qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mla_jax import ops, rope
from mla_jax.cache import Cache, Dense, Paged
from mla_jax.config import MLAConfig
from mla_jax.costs import choose_form
from mla_jax.layers.dropout import dropout_key
from mla_jax.layers.memory import Memory
from mla_jax.layers.projection import Projection, apart, kernel_of, together
from mla_jax.layers.step import Form, Step, check_form, check_positions, row_counts
from mla_jax.ops import dispatch
from mla_jax.ops.weights import weighed_attention

_BIASED = ("q_a_proj", "kv_a_proj", "o_proj")  # what attention_bias=True means


class MultiHeadLatentAttention(nnx.Module):
    """Causal self-attention whose cache holds one latent per token.

    Holds parameters only, no random state and no tables. Kernels: `q_a_proj` [D Q], `q_a_norm` [Q],
    `q_b_proj` [Q N H+P] (or `q_proj` [D N H+P] where q_lora_rank is None), `kv_a_proj` [D R+P],
    `kv_a_norm` [R], `kv_b_proj` [R N H+V], `o_proj` [N V D]. Where the config asks for them:
    `k_rope_norm` [P], `g_proj` [D N 1] or [D N V] (output_gate; "query" widens q_b_proj to
    [2Q N H+P+V]), `sinks` [N], `ssmax_scale` [N], `ssmax_bias` [N].

    Args:
        config: the widths, rotary embedding and scale factors.
        dtype: of the computation; None promotes the input's and the parameters'.
        param_dtype: of the parameters.
        precision: of the matmuls, as in jax.lax.dot.
        kernel_init: initializer of the kernels.
        implementation: backend of the attention cores, one of `ops.dispatch.IMPLEMENTATIONS`: it
            serves every op that the layer calls or raises; a dict from ops to backends names them
            singly, as in {"latent_attention": "pallas_gpu"}; None chooses for the device and the
            shapes (`explain` tells what).
        dropout_rate: of the attention weights in `__call__`, where `deterministic` is False, as
            `model.train()` sets it: weights stand in memory then, and no backend is asked.
        rngs: for the initializers; not kept.

    Raises:
        ValueError: an implementation that does not exist, or a config with index_topk.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, mla_jax
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, config.hidden_size))
    >>> layer(x).shape
    (2, 5, 128)
    >>> y, cache = layer.prefill(x, layer.init_cache(batch_size=2, max_length=16))
    >>> y, cache = layer.decode(x[:, :1], cache)
    >>> y.shape, cache.length
    ((2, 1, 128), Array([6, 6], dtype=int32))
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        implementation: dispatch.Implementation = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(config, MLAConfig):
            raise ValueError(f"config={config!r}: it must be an MLAConfig.")
        if config.refusal is not None:
            raise ValueError(config.refusal)
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = dispatch.frozen(implementation)
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate={dropout_rate}: it must be at least 0 and below 1.")
        # What `model.train()` and `model.eval()` of Flax set.
        self.dropout_rate, self.deterministic = dropout_rate, True

        bias = config.attention_bias
        biased = _BIASED if bias is True else bias or ()

        def linear(name, inputs, outputs):
            return Projection(
                inputs, outputs, use_bias=name in biased, dtype=dtype, param_dtype=param_dtype,
                kernel_init=kernel_init, precision=precision, rngs=rngs,
            )  # fmt: skip

        def norm(width):
            return nnx.RMSNorm(
                width, epsilon=config.latent_norm_eps, dtype=dtype, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip

        width, heads, value = config.hidden_size, config.num_attention_heads, config.v_head_dim
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear("q_proj", (width,), (heads, config.qk_head_dim))
        else:
            gated = config.output_gate == "query"
            channels = config.qk_head_dim + value if gated else config.qk_head_dim
            self.q_a_proj = linear("q_a_proj", (width,), (config.q_lora_rank,))
            if config.latent_norm:
                self.q_a_norm = norm(config.q_lora_rank)
            self.q_b_proj = linear(
                "q_b_proj", ((2 if gated else 1) * config.q_lora_rank,), (heads, channels)
            )
        self.kv_a_proj = linear("kv_a_proj", (width,), (rank + rope,))
        if config.latent_norm:
            self.kv_a_norm = norm(rank)
        if config.k_rope_norm:
            self.k_rope_norm = norm(rope)
        self.kv_b_proj = linear("kv_b_proj", (rank,), (heads, config.qk_nope_head_dim + value))
        if config.output_gate in ("head", "elementwise"):
            gates = 1 if config.output_gate == "head" else value
            self.g_proj = linear("g_proj", (width,), (heads, gates))
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((heads,), param_dtype))
        if config.query_scale_ssmax:
            self.ssmax_scale = nnx.Param(jnp.zeros((heads,), param_dtype))
            self.ssmax_bias = nnx.Param(jnp.ones((heads,), param_dtype))
        self.o_proj = linear("o_proj", (heads, value), (width,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #M"] | None = None,
        causal: bool = True,
        memory: Memory | Float[Array, "B M D"] | None = None,
        form: Form = "auto",
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
    ) -> Float[Array, "B T D"]:
        """Attention without a cache of its own: training, scoring, encoders, cross-attention.

        Args:
            x: activations [B T D].
            positions: int [T] or [B T], default 0..T-1. Causality goes by index, not by position,
                so left-padded rows pass their own positions and a mask. With a memory it is 0.
            segment_ids: int [B T]; tokens attend within their segment (packed sequences).
            mask: boolean (or 0 and 1, as Flax's helpers make them), broadcastable to [B N T T], or
                [B N T M] with a memory, True = may attend; combined with the causal rule. A token
                that may attend to nothing gets zeros before o_proj.
            causal: False lets every token attend to all of its row.
            memory: what is attended to in place of x, by all tokens alike: states [B M D], or what
                `remember` has made of them, once for many calls.
            form: "auto" is expanded here, which is cheaper for any T without a cache; with a memory
                it goes by cost.
            deterministic: without dropout; None is what `model.train()` or `eval()` has set.
            rngs: an `nnx.Rngs`, its stream, or a key, for dropout.
            sow_weights: `nnx.capture` finds the weights [B N T M] as "attention_weights", an
                `nnx.Intermediate`; they are made beside what the backend computes.

        Returns:
            [B T D].

        Raises:
            ValueError: x is not [B T D] of a float dtype, or another argument does not go with it.
        """
        batch, tokens = self._check_input(x)
        check_form(form)
        slots, limits = tokens, None
        if memory is not None:
            memory = memory if isinstance(memory, Memory) else self.remember(memory)
            memory.check(self.config, batch, segment_ids)
            slots, limits, causal = memory.latent.shape[1], memory.limits(tokens), False
        if positions is None:
            first = jnp.arange if memory is None else jnp.zeros
            positions = first(tokens, dtype=jnp.int32)
        else:
            positions = check_positions(positions, batch, tokens)
        by = rope.rotation(positions, self.config, slots)
        q_nope, q_rope, gate = self._queries(x, positions, by)
        if memory is None:
            latent, k_rope = self._latents(x, by)
        else:
            latent, k_rope = memory.latent, memory.k_rope
        absorbed = form == "absorbed"
        if memory is not None and form == "auto":
            absorbed = self._form(tokens, slots) == "absorbed"
        if absorbed:
            queries, keys, value = (self._pattern(q_nope), q_rope), (latent, k_rope), latent
        else:
            k_nope, value = self._keys_values(latent)
            queries, keys = (q_nope, q_rope), (k_nope, k_rope)
        visible: dict[str, Any] = {
            "window": self.config.sliding_window, "mask": mask, "segment_ids": segment_ids,
            "causal": causal,
        }  # fmt: skip
        how: dict[str, Any] = {"scale": self.config.scale, "precision": self.precision}
        named = how | {"implementation": self.implementation}
        key = dropout_key(self, deterministic, rngs)

        def weighed():
            sizes = (batch, tokens, slots, self.config.num_attention_heads)
            seen = ops.checked_seen(limits, *sizes, **visible)
            dropout = {"dropout_rate": self.dropout_rate, "key": key}
            return weighed_attention(queries, keys, value, seen, **dropout, **how)

        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", weighed()[2])
        if key is not None:
            heads, lse, _ = weighed()
        elif absorbed:
            heads, lse = ops.latent_attention(*queries, *keys, lengths=limits, **visible, **named)
        else:
            operands = (*queries, *keys, value)
            heads, lse = ops.expanded_attention(*operands, lengths=limits, **visible, **named)
        return self._output(self._heads(heads) if absorbed else heads, lse, gate)

    def remember(
        self,
        x: Float[Array, "B M D"],
        lengths: Int[Array, "B"] | None = None,
        *,
        positions: Int[Array, "M"] | Int[Array, "B M"] | None = None,
    ) -> Memory:
        """What the layer keeps of a sequence that others attend to: `__call__`'s `memory`.

        Args:
            x: states of that sequence, rows right-padded.
            lengths: int [B], tokens of each row, 0 to M; None is M for all.
            positions: int [M] or [B M], default 0..M-1; queries stand at 0 by default.

        Raises:
            ValueError: as `__call__`; lengths that cannot be.
        """
        batch, tokens = self._check_input(x)
        if positions is None:
            positions = jnp.arange(tokens, dtype=jnp.int32)
        by = rope.rotation(check_positions(positions, batch, tokens), self.config, tokens)
        if lengths is not None:
            lengths = row_counts(lengths, batch, tokens)
            valid = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
            x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
        return Memory(*self._latents(x, by), lengths)

    def init_store(self, batch_size: int, slots: int, dtype=None) -> Dense:
        """Slots of its own for every row: what a `Cache` keeps of this layer's tokens.

        `dtype` is by default that of the computation, or of the parameters where it is None.
        """
        dtype = dtype or self.dtype or self.param_dtype
        widths = {"latent": self.config.kv_lora_rank, "k_rope": self.config.qk_rope_head_dim}
        return Dense(
            {name: jnp.zeros((batch_size, slots, width), dtype) for name, width in widths.items()}
        )

    def init_cache(
        self, batch_size: int, max_length: int, dtype=None, pages: int | None = None
    ) -> Cache:
        """An empty cache of this layer alone: see `Cache.init`."""
        return Cache.init([self], batch_size, max_length, dtype, pages)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        lengths: Int[Array, "B"] | None = None,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        form: Form = "auto",
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends `lengths[b]` tokens to row b, behind what the cache holds, and attends to all.

        A long prompt may come in chunks, and rows of different lengths share a batch.

        Args:
            x: activations [B T D], rows right-padded.
            cache: of this layer, B rows.
            lengths: int [B], tokens of each row, 0 to T; None is T for all.
            positions: int [T] or [B T]; by default they continue from `cache.length`. Causality and
                a sliding window go by cache slot all the same.
            form: "auto" goes by cost (`costs.choose_form`): expanded for a prompt, absorbed for a
                short continuation of a long cache.

        Returns:
            outputs [B T D], zeros past a row's length, and the new cache.

        Raises:
            ValueError: arguments that do not go together, or, outside jit, a row that would
                overflow (under jit its `overflowed` is set).
        """
        batch, tokens = self._check_input(x)
        if len(cache.stores) != 1 or cache.batch_size != batch:
            raise ValueError(
                f"cache has {len(cache.stores)} stores of {cache.batch_size} rows: this layer and "
                f"input take one of {batch} rows, of layer.init_cache({batch}, ...)."
            )
        step = Step.begin(cache, tokens, lengths, positions=positions, form=form)
        y, store, _ = self.extend(x, cache.stores[0], step)
        return y, cache.end([store], step)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        form: Form = "auto",
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends T new tokens (1, or a few drafts) to every row; causal among themselves.

        Args, returns and errors are those of `prefill` without `lengths`.
        """
        return self.prefill(x, cache, positions=positions, form=form)

    def extend(
        self, x: Float[Array, "B T D"], store: Dense, step: Step, relay: Any = None
    ) -> tuple[Float[Array, "B T D"], Dense, Any]:
        """The layer on the new tokens of a step, which all layers of a model share.

        Args:
            x: activations [B T D].
            store: this layer's, of the cache that the step began with.
            step: of `Step.begin`.
            relay: what earlier layers hand to later ones; this layer passes it on.

        Returns:
            outputs [B T D], zeros where a token does not count; the new store; and the relay.

        Raises:
            ValueError: a store of other widths or another dtype than the layer computes in.
        """
        batch, _ = self._check_input(x)
        view = step.view(store)
        self._check_store(view, batch)
        form = step.form
        if form == "auto":
            form = self._form(x.shape[1], step.slots)
        x, by = step.clear(x), step.rotation(self.config)
        q_nope, q_rope, gate = self._queries(x, step.positions, by)
        latent, k_rope = self._latents(x, by)
        with jax.named_scope("cache_append"):
            view = view.write(step.place, latent=latent, k_rope=k_rope)
        attend = self._absorbed if form == "absorbed" else self._expanded
        heads, lse = attend(q_nope, q_rope, latent, k_rope, view, step)
        y = step.clear(self._output(heads, lse, gate))
        return y, view.pool if isinstance(view, Paged) else view, relay

    @property
    def w_uk(self) -> Float[Array, "R N H"]:
        """W_UK, the part of kv_b_proj that makes keys: folded into the query when absorbed."""
        return self._kv_b()[..., : self.config.qk_nope_head_dim]

    @property
    def w_uv(self) -> Float[Array, "R N V"]:
        """W_UV, the part of kv_b_proj that makes values: applied after mixing when absorbed."""
        return self._kv_b()[..., self.config.qk_nope_head_dim :]

    def _form(self, queries, slots):
        """The form that is cheaper; under `jax.export` sizes may be symbols."""
        if not isinstance(queries, int):
            return "expanded"
        return choose_form(self.config, queries, slots if isinstance(slots, int) else 2**30)

    def _kv_b(self):
        config = self.config
        heads = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim)
        return kernel_of(self.kv_b_proj, config.kv_lora_rank, heads)

    def _queries(self, x, positions, by):
        """q_nope [B T N H], rotated q_rope [B T N P], the gate's logits [B T N 1 or V] or None."""
        config, gate = self.config, None
        with jax.named_scope("queries"):
            if config.q_lora_rank is None:
                query = apart(self.q_proj(x), config.num_attention_heads)
            else:
                raw = checkpoint_name(self.q_a_proj(x), "q_latent")
                q_latent = self.q_a_norm(raw) if config.latent_norm else raw
                if config.output_gate == "query":
                    query = self.q_b_proj(jnp.concatenate([q_latent, raw], axis=-1))
                    query = apart(query, config.num_attention_heads)
                    query, gate = jnp.split(query, [config.qk_head_dim], axis=-1)
                else:
                    query = apart(self.q_b_proj(q_latent), config.num_attention_heads)
                if config.mla_scale_q_lora:
                    query = query * math.sqrt(config.hidden_size / config.q_lora_rank)
            q_nope, q_rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
        with jax.named_scope("rope"):
            q_rope = rope.rotate(q_rope, by, config)
        if config.llama_4_scaling_beta is not None or config.query_scale_ssmax:
            scale = self._query_scale(positions).astype(query.dtype)
            q_nope, q_rope = q_nope * scale, q_rope * scale
        if config.output_gate in ("head", "elementwise"):
            with jax.named_scope("g_proj"):
                gate = apart(self.g_proj(x), config.num_attention_heads)
        return checkpoint_name(q_nope, "query"), checkpoint_name(q_rope, "query"), gate

    def _query_scale(self, positions):
        """What queries are multiplied by at their positions, float32 [B T N 1] or smaller."""
        config = self.config
        position = positions.reshape((-1, positions.shape[-1]))[..., None, None]
        scale = jnp.ones(position.shape, jnp.float32)
        if config.llama_4_scaling_beta is not None:
            turns = position // config.llama_4_original_max_position_embeddings
            scale = 1 + config.llama_4_scaling_beta * jnp.log1p(turns.astype(jnp.float32))
        if config.query_scale_ssmax:
            slope, offset = (
                parameter[...].astype(jnp.float32)[None, None, :, None]
                for parameter in (self.ssmax_scale, self.ssmax_bias)
            )
            scale = scale * (slope * jnp.log1p(position.astype(jnp.float32)) + offset)
        return scale

    def _latents(self, x, by):
        """Normalized latent [B T R] and rotated k_rope [B T P], as the cache holds them."""
        config = self.config
        with jax.named_scope("latents"):
            raw = checkpoint_name(self.kv_a_proj(x), "latent")
            latent, k_rope = jnp.split(raw, [config.kv_lora_rank], axis=-1)
            if config.latent_norm:
                latent = self.kv_a_norm(latent)
            if config.mla_scale_kv_lora:
                latent = latent * math.sqrt(config.hidden_size / config.kv_lora_rank)
            if config.k_rope_norm:
                k_rope = self.k_rope_norm(k_rope)
        with jax.named_scope("rope"):
            k_rope = rope.rotate(k_rope, by, config)
        return latent, k_rope

    def _absorbed(self, q_nope, q_rope, latent, k_rope, view, step):
        """Heads [B T N V] and lse [B T N] by the absorbed form, never making keys or values."""
        del latent, k_rope  # the view holds them
        queries = (self._pattern(q_nope), q_rope)
        options = {"scale": self.config.scale, "precision": self.precision}
        seen = step.seen.replace(window=self.config.sliding_window)
        call = ops.latent_call(queries, view, seen, **options)
        seen = step.planned(seen, call, self.implementation)
        out_latent, lse = ops.attend_latents(
            queries, view, seen, implementation=self.implementation, **options
        )
        return self._heads(out_latent), lse

    def _pattern(self, q_nope):
        """What each head looks for among the latents, [B T N R]."""
        with jax.named_scope("w_uk"):
            return self._fold("BTNH,RNH->BTNR", q_nope, self.w_uk)

    def _heads(self, out_latent):
        """Heads [B T N V] from mixed latents [B T N R]."""
        with jax.named_scope("w_uv"):
            return self._fold("BTNR,RNV->BTNV", out_latent, self.w_uv)

    def _fold(self, letters, x, kernel):
        """An einsum with a slice of kv_b_proj that accumulates in float32 for any T."""
        y = jnp.einsum(
            letters, x, kernel.astype(x.dtype), precision=self.precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )  # fmt: skip
        return y.astype(x.dtype)

    def _expanded(self, q_nope, q_rope, latent, k_rope, view, step):
        """Heads and lse by the expanded form, over new tokens and what the rows held before.

        Under a sliding window every token has its own first slot, so all of it goes through the
        cache, which holds the new tokens too.
        """
        window = self.config.sliding_window
        options: dict[str, Any] = {
            "scale": self.config.scale, "precision": self.precision,
            "implementation": self.implementation,
        }  # fmt: skip

        def context(seen):
            return ops.context_attention((q_nope, q_rope), view, seen, self._kv_b(), **options)

        if window is not None:
            return context(step.seen.replace(window=window))
        k_nope, value = self._keys_values(latent)
        own = ops.expanded_attention(q_nope, q_rope, k_nope, k_rope, value, **options)
        if step.fresh:
            return own
        return jax.lax.cond(
            (step.start > 0).any(),
            lambda: ops.merge_attention(own, context(step.before)), lambda: own,
        )  # fmt: skip

    def _keys_values(self, latent):
        """Per-head k_nope [B T N H] and value [B T N V] from latents."""
        with jax.named_scope("kv_b_proj"):
            flat = checkpoint_name(self.kv_b_proj(latent), "keys_values")
            both = apart(flat, self.config.num_attention_heads)
            return jnp.split(both, [self.config.qk_nope_head_dim], axis=-1)

    def _output(self, heads, lse, gate):
        """Y [B T D] from heads [B T N V], their lse [B T N] and the gate's logits."""
        dtype = heads.dtype
        if self.config.attention_sinks:
            with jax.named_scope("sinks"):
                # exp(sink) more in the denominator: heads * exp(lse) / (exp(lse) + exp(sink)).
                sinks = self.sinks[...].astype(lse.dtype)[None, None]
                heads = heads * jax.nn.sigmoid(lse - sinks)[..., None]
        if gate is not None:
            with jax.named_scope("gate"):
                heads = heads * jax.nn.sigmoid(gate.astype(lse.dtype))
        with jax.named_scope("o_proj"):
            return self.o_proj(together(checkpoint_name(heads.astype(dtype), "heads")))

    def _check_input(self, x):
        width = self.config.hidden_size
        if x.ndim != 3 or x.shape[-1] != width or not x.shape[0] or not x.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}: it must be [B T D] with B >= 1, T >= 1 and "
                f"D = hidden_size = {width}."
            )
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
            raise ValueError(
                f"x is {x.dtype}: it must be bfloat16, float16, float32 or float64; cast it first."
            )
        return x.shape[:2]

    def _check_store(self, store, batch):
        widths = {"latent": self.config.kv_lora_rank, "k_rope": self.config.qk_rope_head_dim}
        for name, width in widths.items():
            held = getattr(store, name, None)
            if held is None or held.shape[-1] != width or store.batch_size != batch:
                shape = None if held is None else (store.batch_size, store.slots, held.shape[-1])
                raise ValueError(
                    f"cache.{name} has shape {shape}: for this input and layer it must be "
                    f"({batch}, S, {width})."
                )
