"""What a step would run: which form, by which backend every op of it, and why not by the others."""

import jax
import jax.numpy as jnp

from mla_jax import costs, target
from mla_jax.config import MLAConfig
from mla_jax.models import DecoderConfig
from mla_jax.ops import dispatch, experts
from mla_jax.rates import rates_of


def explain(
    config: MLAConfig | DecoderConfig,
    *,
    batch_size: int = 1,
    length: int = 4096,
    queries: int = 1,
    dtype="bfloat16",
    device: jax.Device | target.Target | None = None,
    pages: bool = False,
    implementation: dispatch.Implementation = None,
) -> None:
    """Prints which form and backends would run for these shapes, and why the others would not.

    Args:
        config: the layer, or a whole model, whose experts are listed too.
        batch_size: B, rows decoded together.
        length: S, slots of the cache.
        queries: T, new tokens of a step.
        dtype: of the cache and the computation.
        device: where, a device or a `Target`; None is what is compiled for now.
        pages: whether rows share a pool of pages.
        implementation: of the layer.

    Raises:
        ValueError: a number below 1, or a dtype that is not floating.

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
    device = target.current() if device is None else target.of(device)
    named = dispatch.normalized(implementation)
    model = config if isinstance(config, DecoderConfig) else None
    config = config.attention if isinstance(config, DecoderConfig) else config
    rates = rates_of(device.kind)
    form = costs.choose_form(config, queries, length, rates)
    crossover = costs.crossover_queries(config, length, rates)
    print(f"{device}, {jnp.dtype(dtype).name}")
    print(
        f"step of {queries} token(s) per row on {batch_size} x {length} slots: {form} "
        f"(absorbed up to {crossover:.0f} tokens, expanded above, by {rates.source})"
    )
    if config.index_topk is not None:
        _print_choice(config, length)
    store = "paged" if pages else "dense"
    for op, what, call in _calls(config, form, batch_size, length, queries, dtype, store):
        print(f"{op} ({what}):")
        _print_backends(dispatch.report(call, device), named.get(op))
    if model is not None and model.n_routed_experts is not None:
        tokens, chosen = batch_size * queries, model.num_experts_per_tok
        widths = config.hidden_size, model.moe_intermediate_size or 0
        name = jnp.dtype(dtype).name
        call = experts.Call(tokens, tokens * chosen, model.n_routed_experts, widths, name)
        print(f"routed_experts ({chosen} of {model.n_routed_experts} for each token):")
        _print_backends(experts.report(call, device), named.get("routed_experts"))


def _print_choice(config, slots):
    """What sparse attention attends to of this many slots, and what chooses it."""
    if not config.is_sparse(slots):
        print(
            f"index_topk={config.index_topk}: every one of {slots} slots can be chosen, so "
            "attention is dense and nothing is scored"
        )
        return
    print(f"index_topk={config.index_topk}: attention to chosen slots of {slots}")
    if config.has_indexer:
        heads, width = config.index_n_heads, config.index_head_dim
        print(f"choose_slots ({heads} index heads of {width} channels, then the best):")
        print("  xla: runs")
    else:
        print("choose_slots: not here, the choice is that of the last layer with an indexer")


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


def _calls(config, form, batch, slots, queries, dtype, store):
    """The ops that a step of this form calls: name, purpose, and what is static of the call."""
    heads, name = config.num_attention_heads, jnp.dtype(dtype).name
    rope, window = config.qk_rope_head_dim, config.sliding_window
    sparse = config.is_sparse(slots)

    def call(op, of_slots, key_dim, value_dim, options, of_store):
        more = ["window"] if window else ["chosen"] if sparse and of_store == store else []
        options = tuple(sorted((*options, *more)))
        return dispatch.Call(
            op, batch, queries, of_slots, heads, (key_dim, rope), value_dim, name, options, of_store
        )

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
