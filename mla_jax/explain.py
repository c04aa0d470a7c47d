"""What a step would run: which form, by which backend every op of it, and why not by the others."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import costs, target
from mla_jax import sharding as placing
from mla_jax.cache import ENCODINGS, checked_dtype
from mla_jax.config import MLAConfig
from mla_jax.models import DecoderConfig
from mla_jax.ops import dispatch, experts
from mla_jax.ops.mesh import Layout
from mla_jax.rates import rates_of


def explain(
    config: MLAConfig | DecoderConfig,
    *,
    batch_size: int = 1,
    length: int = 4096,
    queries: int = 1,
    dtype="bfloat16",
    cache_dtype=None,
    device: jax.Device | target.Target | None = None,
    pages: bool = False,
    implementation: dispatch.Implementation = None,
    mesh: Any = None,
    sharding: placing.Rules | None = None,
) -> None:
    """Prints which form and backends would run for these shapes, and why the others would not.

    Args:
        config: the layer, or a whole model, whose experts are listed too.
        batch_size: B, rows decoded together.
        length: S, slots of the cache.
        queries: T, new tokens of a step.
        dtype: of the cache and the computation.
        cache_dtype: float8_e4m3fn or int8, where the cache holds its latents so; None is `dtype`.
        device: where, a device or a `Target`; None is what is compiled for now.
        pages: whether rows share a pool of pages.
        implementation: of the layer.
        mesh: of several devices, which may be abstract (`jax.sharding.AbstractMesh`); what is
            printed then is what each of them runs.
        sharding: the rules by which the mesh splits rows, slots, heads and experts.

    Raises:
        ValueError: a number below 1, a dtype that is not floating, a cache_dtype that is neither
            of these two, rules without a mesh, or sizes that do not divide over it.

    >>> v3, cpu = MLAConfig.from_preset("deepseek_v3"), jax.devices("cpu")[0]
    >>> explain(v3, device=cpu)  # doctest: +ELLIPSIS
    cpu (cpu), bfloat16
    step of 1 token(s) per row on 1 x 4096 slots: absorbed (absorbed up to ...
    latent_attention (new tokens to all cached ones):
    ...
    >>> explain(MLAConfig.from_preset("deepseek_v32"), length=2048, device=cpu)
    ... # doctest: +ELLIPSIS
    cpu (cpu), bfloat16
    ...
    index_topk=2048: every one of 2048 slots can be chosen, so attention is dense and nothing is ...
    ...
    """
    for key, value in (("batch_size", batch_size), ("length", length), ("queries", queries)):
        if value < 1:
            raise ValueError(f"{key}={value!r}: it must be at least 1.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={jnp.dtype(dtype).name!r}: it must be of floating numbers.")
    if sharding is not None and mesh is None:
        raise ValueError("sharding needs the mesh, as mesh=...")
    rules: Any = placing.Rules() if sharding is None else sharding
    if device is None and mesh is not None:
        device = mesh.abstract_mesh.abstract_device
    encoding = None if cache_dtype is None else checked_dtype("cache_dtype", cache_dtype).name
    if encoding not in (None, *ENCODINGS):
        raise ValueError(f"cache_dtype={encoding}: it must be None or {' or '.join(ENCODINGS)}.")
    device = target.current() if device is None else target.of(device)
    named = dispatch.normalized(implementation)
    model = config if isinstance(config, DecoderConfig) else None
    config = config.attention if isinstance(config, DecoderConfig) else config
    rates = rates_of(device.kind)
    form = costs.choose_form(config, queries, length, rates)
    crossover = costs.crossover_queries(config, length, rates)
    print(f"{device}, {jnp.dtype(dtype).name}" + (f", {encoding} latents" if encoding else ""))
    print(
        f"step of {queries} token(s) per row on {batch_size} x {length} slots: {form} "
        f"(absorbed up to {crossover:.0f} tokens, expanded above, by {rates.source})"
    )
    store = "paged" if pages else "dense"
    if mesh is not None:
        heads = config.num_attention_heads
        _print_parts(rules, mesh, {"B": batch_size, "S": length, "N": heads})
    shapes = (batch_size, length, queries)
    if config.index_topk is not None:
        layout = None if mesh is None else Layout(mesh, rules.B, rules.S)
        for call, what in _choice(config, form, *shapes, dtype, store, layout):
            print(f"{call.op} ({what}):")
            _print_backends(dispatch.report(call, device), named.get(call.op))
    for op, what, call in _calls(config, form, *shapes, dtype, store, encoding):
        if mesh is not None:
            slots = () if op == "expanded_attention" else rules.S
            own = placing.without(rules.N, rules.B, slots)
            call = dataclasses.replace(call, layout=Layout(mesh, rules.B, slots, own))
        print(f"{op} ({what}):")
        _print_backends(dispatch.report(call, device), named.get(op))
    if model is not None and model.n_routed_experts is not None:
        tokens, chosen = batch_size * queries, model.num_experts_per_tok
        widths, count = (config.hidden_size, model.moe_intermediate_size or 0), 1
        name = jnp.dtype(dtype).name
        if mesh is not None:
            _print_parts(rules, mesh, {"E": model.n_routed_experts})
            count = placing.count(mesh, rules.E)
            # What comes to a device is of all that share its experts.
            tokens //= placing.count(mesh, placing.without(rules.B, rules.E))
        of = model.n_routed_experts // count
        call = experts.Call(tokens, tokens * chosen, of, widths, name, partial=count > 1)
        print(f"routed_experts ({chosen} of {model.n_routed_experts} for each token):")
        _print_backends(experts.report(call, device), named.get("routed_experts"))


def _print_parts(rules, mesh, sizes):
    """What each device of a mesh has of these letters."""
    words = {"B": "rows", "S": "slots of each", "N": "heads' weights", "E": "experts"}
    parts = []
    for letter, size in sizes.items():
        rules.sharding(letter, (size,), mesh, "the model")
        axes = getattr(rules, letter)
        over = f" (of {size}, over {', '.join(axes)})" if axes else ""
        parts.append(f"{size // placing.count(mesh, axes)} {words[letter]}{over}")
    print(f"on each of {mesh.size} devices: {', '.join(parts)}")


def _choice(config, form, batch, slots, queries, dtype, store, layout):
    """Says what sparse attention attends to; yields the calls that choose it, and their purpose."""
    if not config.is_sparse(slots):
        print(
            f"index_topk={config.index_topk}: every one of {slots} slots can be chosen, so "
            "attention is dense and nothing is scored"
        )
        return
    print(f"index_topk={config.index_topk}: attention to chosen slots of {slots}")
    if not config.has_indexer:
        print("index_scores, best_slots: not here, the last layer with an indexer has chosen")
        return
    if layout is not None and layout.slots:
        print(
            f"index_scores, best_slots: refused, slots S are split over {', '.join(layout.slots)}"
        )
        return
    heads, width, name = config.index_n_heads, config.index_head_dim, jnp.dtype(dtype).name
    count, what, limits = config.index_topk, "slots", "lengths"
    if form == "expanded" and queries > 1:
        limits = "lengths per query"
    if config.index_kpool is not None:  # pools are made of a whole row, for this call
        count, slots = count // config.index_kpool, slots // config.index_kpool
        what, store = f"pools of {config.index_kpool} slots", "dense"
    call = dispatch.Call(
        "index_scores", batch, queries, slots, heads, (width, 0), 0, name, (limits,), store,
        layout=layout,
    )  # fmt: skip
    yield call, f"{heads} index heads of {width} channels on {slots} {what}"
    best = dataclasses.replace(
        call, op="best_slots", heads=1, key_dims=(0, 0), value_dim=count, dtype="float32",
        options=("lengths",), store="dense",
    )  # fmt: skip
    yield best, f"the best {count} of {slots} {what}"


def _print_backends(report, named):
    chosen = False
    for backend, reason in report:
        if named is not None and backend != named:
            continue
        if reason is not None:
            print(f"  {backend}: no: {reason}")
        elif chosen:
            print(f"  {backend}: could serve, comes later in the order of preference")
        else:
            print(f"  {backend}: runs")
            chosen = True
    if named is not None and not chosen:
        print(f"  implementation={named!r} raises an error")


def _calls(config, form, batch, slots, queries, dtype, store, encoding):
    """The ops that a step of this form calls: name, purpose, and what is static of the call."""
    heads, name = config.num_attention_heads, jnp.dtype(dtype).name
    rope, window = config.qk_rope_head_dim, config.sliding_window
    sparse = config.is_sparse(slots)

    def call(op, of_slots, key_dim, value_dim, options, of_store):
        more = ["window"] if window else ["chosen"] if sparse and of_store == store else []
        options = tuple(sorted((*options, *more)))
        cached = None if op == "expanded_attention" else encoding
        return dispatch.Call(
            op, batch, queries, of_slots, heads, (key_dim, rope), value_dim, name, options,
            of_store, encoding=cached,
        )  # fmt: skip

    rank = config.kv_lora_rank
    widths = config.qk_nope_head_dim, config.v_head_dim
    if form == "absorbed":
        latent = call("latent_attention", slots, rank, rank, ("lengths",), store)
        what = "new tokens to chosen ones" if sparse else "new tokens to all cached ones"
        yield "latent_attention", what, latent
        return
    if window is None and not sparse:
        own = call("expanded_attention", queries, *widths, (), "dense")
        yield "expanded_attention", "new tokens among themselves", own
    context = call("context_attention", slots, *widths, ("lengths per query",), store)
    what = "new tokens to chosen ones" if sparse else "new tokens to what was cached before"
    yield "context_attention", what, context
