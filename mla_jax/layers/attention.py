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
this flow, switched on by the config. Sparse attention (`layers.indexer`) chooses which slots a
query attends to; a layer may also take an earlier one's choice, or its cache, out of the `Relay`.

Letters: B batch, T query tokens, S cache slots, N heads, D hidden size, Q q_lora_rank,
R kv_lora_rank, H qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from mla_jax import ops, rope, sharding, target
from mla_jax.cache import Dense, Paged, Scaled, Store, is_encoding
from mla_jax.costs import choose_form
from mla_jax.layers.dropout import dropout_key
from mla_jax.layers.indexer import Indexer, indexer_loss
from mla_jax.layers.maps import LatentMaps
from mla_jax.layers.memory import Memory
from mla_jax.layers.relay import Relay
from mla_jax.layers.step import Form, Step, check_form
from mla_jax.layers.whole import whole_pass
from mla_jax.ops.seen import Seen
from mla_jax.ops.weighed import weighed_attention
from mla_jax.plain import Plain, Whole
from mla_jax.rates import rates_of

_LATENTS = ("latent", "k_rope")


class MultiHeadLatentAttention(LatentMaps):
    """Causal self-attention whose cache holds one latent per token.

    Its parameters, all that it holds, and the maps of single tokens are `LatentMaps`'s. Kernels:
    `q_a_proj` [D Q], `q_a_norm` [Q], `q_b_proj` [Q N H+P] (or `q_proj` [D N H+P] where q_lora_rank
    is None), `kv_a_proj` [D R+P], `kv_a_norm` [R], `kv_b_proj` [R N H+V], `o_proj` [N V D]. Where
    the config asks for them: `k_rope_norm` [P], `g_proj` [D N 1] or [D N V] (output_gate; "query"
    widens q_b_proj to [2Q N H+P+V]), `sinks`, `ssmax_scale`, `ssmax_bias` [N], `indexer`.

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
        ValueError: an implementation that does not exist.

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

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | Plain | None = None,
        segment_ids: Int[Array, "B T"] | Plain | None = None,
        mask: Shaped[Array, "#B #N #T #M"] | Plain | None = None,
        causal: bool = True,
        memory: Memory | Float[Array, "B M D"] | None = None,
        form: Form = "auto",
        dense: bool = False,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
    ) -> Float[Array, "B T D"]:
        """Attention without a cache of its own: training, scoring, encoders, cross-attention.

        Args:
            x: activations [B T D].
            positions: int [T] or [B T], default 0..T-1. Causality goes by index, not by position,
                so left-padded rows pass their own positions and a mask. With a memory 0 for all.
            segment_ids: int [B T]; tokens attend within their segment (packed sequences).
            mask: boolean (or 0 and 1, as Flax's helpers make them), broadcastable to [B N T T], or
                [B N T M] with a memory, True = may attend; combined with the causal rule. A token
                that may attend to nothing gets zeros before o_proj.
            causal: False lets every token attend to all of its row.
            memory: what is attended to in place of x, by all tokens alike: states [B M D], or what
                `remember` has made of them, once for many calls.
            form: "auto" goes by cost: expanded here for any T, but for a memory, and for sparse
                attention to far fewer than T tokens.
            dense: attend to all tokens whatever index_topk says, as while an indexer warms up.
            deterministic: without dropout; None is what `model.train()` or `eval()` has set.
            rngs: an `nnx.Rngs`, its stream, or a key, for dropout.
            sow_weights: `nnx.capture` finds the weights [B N T M] as "attention_weights", an
                `nnx.Intermediate`; they are made beside what the backend computes.

        Returns:
            [B T D].

        Raises:
            ValueError: x is not [B T D] of a float dtype, or another argument does not go with it;
                or the layer needs what an earlier one hands on (`attend`).
        """
        return self.attend(
            x, positions=positions, segment_ids=segment_ids, mask=mask, causal=causal,
            memory=memory, form=form, dense=dense, deterministic=deterministic, rngs=rngs,
            sow_weights=sow_weights,
        )[0]  # fmt: skip

    def attend(
        self,
        x: Float[Array, "B T D"],
        relay: Relay | None = None,
        *,
        memory: Memory | Float[Array, "B M D"] | None = None,
        form: Form = "auto",
        dense: bool = False,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
        **seeing: Any,
    ) -> tuple[Float[Array, "B T D"], Relay | None]:
        """`__call__` between other layers: with what they have handed on, and what this one does.

        Args:
            x: activations [B T D].
            relay: of the layers before; None where this is the first.
            memory, form, dense, deterministic, rngs, sow_weights: as in `__call__`.
            seeing: positions, segment_ids, mask, causal, as there.
        """
        (batch, tokens), config = self.check_input(x), self.config
        check_form(form)
        if memory is not None and not isinstance(memory, Memory):
            memory = self.remember(memory)
        positions, seen = whole_pass(config, batch, tokens, memory=memory, **seeing)
        slots = tokens if memory is None else memory.latent.shape[1]
        by = rope.rotation(positions, config, slots)
        q_nope, q_rope, gate, q_latent = self._queries(x, positions, by)
        if memory is not None:
            new = {"latent": memory.latent, "k_rope": memory.k_rope}
        else:
            new = {} if config.kv_source_layer is not None else self._latents(x, by)
        if config.has_indexer:
            new["index_key"] = self.indexer.keys(x, by)
        held, relay = self._handed(Dense(new), relay)
        if config.index_topk is not None and not dense:
            seen, relay = self._chosen(x, q_latent, positions, by, Dense(new), seen, relay)
        absorbed = form == "absorbed"
        if form == "auto" and (seen.chosen is not None or memory is not None):
            absorbed = self._form(tokens, slots) == "absorbed"
        queries, core = (q_nope, q_rope), cast(Any, ops.attend_expanded)
        if absorbed:
            queries, core = (self._pattern(q_nope), q_rope), ops.attend_latents
        else:
            k_nope, value = self._keys_values(held.latent)
            held = Dense({"k_nope": k_nope, "k_rope": held.k_rope, "value": value})
        how: dict[str, Any] = {"scale": config.scale, "precision": self.precision}
        dropout = {"rate": self.dropout_rate, "key": dropout_key(self, deterministic, rngs)}
        if sow_weights:
            found = weighed_attention(queries, held, seen, **how)[2]
            self.sow(nnx.Intermediate, "attention_weights", found)
        if dropout["key"] is None:
            heads, lse = core(queries, held, seen, implementation=self.implementation, **how)
        else:
            heads, lse, _ = weighed_attention(queries, held, seen, **dropout, **how)
        heads = self._heads(heads) if absorbed else heads
        return sharding.beside(self._output(heads, lse, gate), x), relay

    def init_store(self, batch_size: Whole, slots: Whole, dtype=None) -> Dense:
        """Slots of its own for every row: what a `Cache` keeps of this layer's tokens.

        `dtype` is by default that of the computation, or of the parameters where it is None. With
        float8_e4m3fn and int8 it is latents that are held so, the rest is as by default.
        """
        own, widths = self.dtype or self.param_dtype, self._widths()
        if is_encoding(dtype) and "latent" in widths:
            return Scaled.init(batch_size, slots, widths, dtype, own)
        dtype = own if dtype is None or is_encoding(dtype) else dtype
        return Dense({name: jnp.zeros((batch_size, slots, k), dtype) for name, k in widths.items()})

    def extend(
        self, x: Float[Array, "B T D"], store: Dense, step: Step, relay: Relay | None = None
    ) -> tuple[Float[Array, "B T D"], Dense, Relay | None]:
        """The layer on the new tokens of a step, which all layers of a model share.

        Args:
            x: activations [B T D].
            store: this layer's, of the cache that the step began with.
            step: of `Step.begin`.
            relay: what earlier layers have handed on; None where this is the first.

        Returns:
            outputs [B T D], zeros where a token does not count; the new store; and the relay for
            the layers behind, None where nothing has been handed on.

        Raises:
            ValueError: a store of other widths or another dtype than the layer computes in, or one
                without index keys; a relay that lacks what the layer takes from it.
        """
        tokens = self.check_input(x)[1]
        view, batch = step.view(store), step.own(x).shape[0]
        self._check_store(view, batch, self._widths())
        x, by = step.clear(x), step.rotation(self.config)
        made, latents = self._projected(x)
        q_nope, q_rope, gate, q_latent = self._queries(x, step.positions, by, made)
        form = step.form
        if form == "auto":  # a fresh row has nothing but the new tokens to attend to
            form = self._form(tokens, tokens if step.fresh else step.slots)
        absorbed = form == "absorbed"
        queries = q_nope, q_rope
        queries, own, new = self._appended(queries, x, by, latents, view, step, absorbed)
        q_nope, q_rope = queries
        # At batch 1 on a GPU, x has equal rows, because XLA multiplies several faster than one.
        every, x = x, step.own(x)
        source, relay = self._handed(own, relay)
        self._check_store(source, batch, {name: self._widths(True)[name] for name in _LATENTS})
        seen = step.seen.replace(window=self.config.sliding_window)
        if self.config.index_topk is not None:
            q_latent = step.own(q_latent)
            seen, relay = self._chosen(x, q_latent, step.positions, by, own, seen, relay)
        if absorbed:
            heads, lse = self._absorbed(q_nope, q_rope, source, seen, step)
        else:
            queries = step.own(q_nope), step.own(q_rope)
            heads, lse = map(step.copied, self._expanded(*queries, new, source, seen, step))
        y = step.clear(sharding.beside(self._output(heads, lse, gate), every))
        return y, own.pool if isinstance(own, Paged) else own, relay

    def indexer_loss(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | Plain | None = None,
        segment_ids: Int[Array, "B T"] | Plain | None = None,
        mask: Shaped[Array, "#B 1 #T #T"] | Plain | None = None,
        warmup: bool = False,
    ) -> Float[Array, ""]:
        """What the layer's indexer is trained by: see `layers.indexer.indexer_loss`.

        The target is the softmax of this layer's own attention, summed over heads. Only the
        indexer's parameters have a gradient.

        Args:
            x: the layer's input.
            positions, segment_ids, mask: as in `__call__`.
            warmup: the target is attention to all tokens; otherwise to the chosen ones.

        Raises:
            ValueError: the layer has no indexer, or pools its keys.
        """
        config = self.config
        if not config.has_indexer or config.index_kpool is not None:
            raise ValueError(
                f"index_topk={config.index_topk}, indexer_type={config.indexer_type!r}, index_kpool"
                f"={config.index_kpool}: the loss is of an indexer that chooses single tokens."
            )
        options = {"positions": positions, "segment_ids": segment_ids, "mask": mask}
        positions, seen = whole_pass(config, *self.check_input(x), **options)
        x = jax.lax.stop_gradient(x)
        by = rope.rotation(positions, config, x.shape[1])
        q_nope, q_rope, _, q_latent = self._queries(x, positions, by)
        new = self._latents(x, by) if config.kv_source_layer is None else {}
        if not new:
            raise ValueError(f"kv_source_layer={config.kv_source_layer}: the loss needs latents.")
        keys = self.indexer.keys(x, by)
        queries = self.indexer.queries(x, q_latent, positions, by)
        if not warmup and config.is_sparse(x.shape[1]):
            held = Dense({"index_key": keys})
            chosen = self.indexer.choose(queries, held, seen, self.implementation)
            seen = seen.replace(chosen=chosen)
        absorbed = (self._pattern(q_nope), q_rope)
        target = ops.attention_weights(absorbed, Dense(new), seen, scale=config.scale)
        visible = seen.visible(jnp.arange(x.shape[1], dtype=jnp.int32))[:, 0]
        visible = jnp.broadcast_to(visible, target.shape)
        return indexer_loss(target, self.indexer.scores(queries, keys), visible)

    def _widths(self, latents: bool = False) -> dict[str, int]:
        """Of the store's arrays; with `latents` also where those are another layer's."""
        config, widths = self.config, {}
        if config.kv_source_layer is None or latents:
            widths = {"latent": config.kv_lora_rank, "k_rope": config.qk_rope_head_dim}
        if config.has_indexer:
            widths["index_key"] = Indexer.width(config)
        # Of a layer that keeps nothing there is an array without channels, which has slots.
        return widths or {"index_key": 0}

    def _handed(self, own: Store, relay: Relay | None):
        """The store that the layer attends to, its own or an earlier layer's; the relay behind."""
        config = self.config
        if config.kv_source_layer is not None:
            return (relay or Relay()).store(config.kv_source_layer), relay
        if config.kv_store_layer is not None:
            relay = (relay or Relay()).with_store(config.kv_store_layer, own)
        return own, relay

    def _chosen(self, x, q_latent, positions, by, store: Store, seen: Seen, relay: Relay | None):
        """What queries see after the choice, this layer's or the last one's; the relay behind.

        Where all slots can be chosen, nothing is.
        """
        config, relay = self.config, relay or Relay()
        if not config.has_indexer:
            return seen.replace(chosen=relay.choice()), relay
        slots, chosen = store.slots, None
        if not isinstance(slots, int):
            raise ValueError(
                f"index_topk={config.index_topk}: the number of slots to choose among must be "
                f"known, and not the symbol {slots}: export the program for one number."
            )
        if config.is_sparse(slots):
            queries = self.indexer.queries(x, q_latent, positions, by)
            chosen = self.indexer.choose(queries, store, seen, self.implementation)
        return seen.replace(chosen=chosen), relay.with_choice(chosen)

    def _form(self, queries, slots):
        """The form that is cheaper on S slots; under `jax.export` either size may be a symbol."""
        if not isinstance(queries, int):
            return "expanded"
        slots = slots if isinstance(slots, int) else 2**30
        return choose_form(self.config, queries, slots, rates_of(target.current().kind))

    def _absorbed(self, q_nope, q_rope, source, seen, step):
        """Heads [B T N V] and lse [B T N] by the absorbed form, never making keys or values."""
        queries = step.own(self._pattern(q_nope)), step.own(q_rope)
        options = {"scale": self.config.scale, "precision": self.precision}
        if seen.chosen is None:  # a plan is of all layers, a choice of one
            call = ops.latent_call(queries, source, seen, **options)
            seen = step.planned(seen, call, self.implementation)
        out_latent, lse = ops.attend_latents(
            queries, source, seen, implementation=self.implementation, **options
        )
        return self._heads(step.copied(out_latent)), step.copied(lse)

    def _expanded(self, q_nope, q_rope, new, source, seen, step):
        """Heads and lse by the expanded form, over new tokens and what the rows held before.

        Under a sliding window every token has its own first slot, under sparse attention its own
        slots, so all of it goes through the cache, which holds the new tokens too; so it does where
        the cache is another layer's.
        """
        options: dict[str, Any] = {
            "scale": self.config.scale, "precision": self.precision,
            "implementation": self.implementation,
        }  # fmt: skip

        def context(seen):
            return ops.context_attention((q_nope, q_rope), source, seen, self._kv_b(), **options)

        if seen.window is not None or seen.chosen is not None or "latent" not in new:
            return context(seen)
        k_nope, value = self._keys_values(new["latent"])
        own = ops.expanded_attention(q_nope, q_rope, k_nope, new["k_rope"], value, **options)
        if step.fresh:
            return own
        held = (step.start > 0).any()
        merged = lambda: ops.merge_attention(own, context(step.before))  # noqa: E731
        if not isinstance(held, jax.core.Tracer):  # where `cond` would be compiled in every call
            return merged() if held else own
        return jax.lax.cond(held, merged, lambda: own)

    def _check_store(self, store, batch, widths):
        for name, width in widths.items():
            held = getattr(store, name, None)
            if held is None or held.shape[-1] != width or store.batch_size != batch:
                shape = None if held is None else (store.batch_size, store.slots, held.shape[-1])
                raise ValueError(
                    f"cache.{name} has shape {shape}: for this input and layer it must be "
                    f"({batch}, S, {width})."
                )
