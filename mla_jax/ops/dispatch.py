"""The two attention cores behind one signature each: validate, choose a backend, call it.

A backend is a module in this folder with the op and `why_not(spec, device) -> str | None`; adding
one is that file and one line in `_LATENT` or `_EXPANDED`, which are in order of preference.

Letters: B batch, T query tokens, S cache slots, N heads, R kv_lora_rank, H qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mla_jax.config import MLAConfig
from mla_jax.ops import cudnn, hopper, reference, tpu, xla
from mla_jax.ops.reference import merge_attention as merge_attention

_LATENT: dict[str, types.ModuleType] = {
    "pallas_gpu": hopper,
    "pallas_tpu": tpu,
    "xla": xla,
    "reference": reference,
}
_EXPANDED: dict[str, types.ModuleType] = {"cudnn": cudnn, "xla": xla, "reference": reference}

IMPLEMENTATIONS = tuple(dict.fromkeys([*_LATENT, *_EXPANDED]))
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a backend needs to know to say whether it can serve a call.

    Attributes:
        op: "latent_attention" or "expanded_attention".
        batch, queries, slots, heads: B, T, S, N.
        key_dims: widths of the two parts of a key, (R, P) or (H, P).
        value_dim: R or V.
        dtype: of the operands.
        options: names of the optional arguments in use ("mask", "window", ...), sorted.
    """

    op: str
    batch: int
    queries: int
    slots: int
    heads: int
    key_dims: tuple[int, int]
    value_dim: int
    dtype: str
    options: tuple[str, ...] = ()


def latent_attention(
    pattern: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"],
    k_rope: Float[Array, "B S P"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    precision=None,
    implementation: str | None = None,
    schedule: Any = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """Attention of per-head patterns over shared latents: the core of the absorbed form.

    out_latent[b,t,n] = sum_s softmax_s(scale (pattern[b,t,n] . latent[b,s]
    + q_rope[b,t,n] . k_rope[b,s])) latent[b,s] (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    Args:
        pattern: queries with W_UK folded in, [B T N R].
        q_rope: rotated rotary queries [B T N P]; P may be 0.
        latent: cached latents [B S R].
        k_rope: cached rotary keys, rotated, [B S P].
        lengths: int [B]: valid slots of each row, the T query tokens being the last of them, so
            that query t sees lengths - (T-1-t) slots; or int [B T]: slots each query sees. A limit
            of 0 or less gives zeros and lse = -inf. None: all S slots are valid.
        scale: softmax temperature, `MLAConfig.scale`. It does not follow from R + P.
        soft_cap: scores become soft_cap tanh(scores / soft_cap).
        window: a query sees only the last `window` slots up to its own.
        mask: boolean, True = may attend, combined with the causal rule.
        segment_ids: int [B S]; a query attends to slots of its own segment. The queries' ids are
            the last T.
        precision: of the matmuls, as in jax.lax.dot; kernels ignore it.
        implementation: a backend's name, or None for the first that can serve.
        schedule: what `decode_schedule` made of the same lengths, for many layers at once; None
            makes it here where the backend needs one.

    Returns:
        out_latent [B T N R] in the operands' dtype and lse [B T N] float32, the natural log of the
        sum of exp(scores); two results over disjoint slots merge by it (`merge_attention`).

    Raises:
        ValueError: shapes or dtypes that do not go together, or lengths beyond S.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    >>> pattern, q_rope = jnp.ones((2, 1, 4, 64)), jnp.ones((2, 1, 4, 16))
    >>> latent, k_rope = jnp.ones((2, 8, 64)), jnp.ones((2, 8, 16))
    >>> out, lse = latent_attention(
    ...     pattern, q_rope, latent, k_rope, lengths=jnp.array([8, 3]), scale=48**-0.5)
    >>> out.shape, lse.shape
    ((2, 1, 4, 64), (2, 1, 4))
    >>> latent_attention(pattern, q_rope, latent, k_rope, lengths=jnp.array([9, 3]), scale=48**-0.5)
    Traceback (most recent call last):
    ValueError: lengths=[9 3] go beyond the S = 8 slots.
    """
    batch, tokens, heads, rank = _shape("pattern", pattern, "B T N R")
    slots = _shape("latent", latent, "B S R")[1]
    rope = _shape("q_rope", q_rope, "B T N P")[-1]
    _expect("q_rope", q_rope, (batch, tokens, heads, rope), "B T N P")
    _expect("latent", latent, (batch, slots, rank), "B S R")
    _expect("k_rope", k_rope, (batch, slots, rope), "B S P")
    dtype = _common_dtype(pattern=pattern, q_rope=q_rope, latent=latent, k_rope=k_rope)
    options = _options(
        batch, tokens, slots, heads, lengths=lengths, soft_cap=soft_cap, window=window, mask=mask,
        segment_ids=segment_ids,
    )  # fmt: skip
    spec = Spec("latent_attention", batch, tokens, slots, heads, (rank, rope), rank, dtype, options)
    backend = _choose(_LATENT, spec, implementation)
    more = {"schedule": schedule} if hasattr(_LATENT[backend], "decode_schedule") else {}
    with jax.named_scope(f"latent_attention.{backend}"):
        return _LATENT[backend].latent_attention(
            pattern, q_rope, latent, k_rope, lengths=lengths, scale=scale, soft_cap=soft_cap,
            window=window, mask=mask, segment_ids=segment_ids, precision=precision, **more,
        )  # fmt: skip


def decode_schedule(
    config: MLAConfig,
    lengths: Int[Array, "B"],
    *,
    slots: int,
    queries: int = 1,
    dtype="bfloat16",
    implementation: str | None = None,
) -> Any:
    """How the chosen backend would cut these rows among processors: once a step, for all layers.

    Args:
        config: of the layers.
        lengths: int [B], slots in use of every row, the new tokens included.
        slots: S, slots of the cache.
        queries: T, new tokens of the step.
        dtype: of the cache.
        implementation: as in `latent_attention`.

    Returns:
        what `latent_attention` and the layer's `decode` take as `schedule`: a pytree of arrays, or
        None where the backend that would run needs none.

    >>> config = MLAConfig.from_preset("deepseek_v3")
    >>> lengths = jnp.array([100, 7])
    >>> decode_schedule(config, lengths, slots=128, implementation="xla") is None
    True
    """
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    spec = Spec(
        "latent_attention", lengths.shape[0], queries, slots, heads,
        (rank, config.qk_rope_head_dim), rank, jnp.dtype(dtype).name, ("lengths",),
    )  # fmt: skip
    module = _LATENT[_choose(_LATENT, spec, implementation)]
    if not hasattr(module, "decode_schedule"):
        return None
    with jax.named_scope("decode_schedule"):
        return module.decode_schedule(lengths, queries=queries, heads=heads, slots=slots)


def expanded_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    k_nope: Float[Array, "B S N H"],
    k_rope: Float[Array, "B S P"],
    value: Float[Array, "B S N V"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    precision=None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention with per-head keys and values, the rotary key shared: the expanded form's core.

    Args:
        q_nope, q_rope: queries without and with (rotated) position, [B T N H] and [B T N P].
        k_nope: per-head keys [B S N H].
        k_rope: the rotary key shared by all heads, rotated, [B S P].
        value: [B S N V]; V need not be H + P.
        lengths, scale, soft_cap, window, mask, segment_ids, precision, implementation: as in
            `latent_attention`; with lengths None and T = S this is causal self-attention.

    Returns:
        out [B T N V] in the operands' dtype and lse [B T N] float32.

    Raises:
        ValueError, NotImplementedError: as `latent_attention`.

    >>> q_nope, q_rope = jnp.ones((2, 5, 4, 32)), jnp.ones((2, 5, 4, 16))
    >>> k_nope, k_rope = jnp.ones((2, 5, 4, 32)), jnp.ones((2, 5, 16))
    >>> value = jnp.ones((2, 5, 4, 24))
    >>> out, lse = expanded_attention(q_nope, q_rope, k_nope, k_rope, value, scale=48**-0.5)
    >>> out.shape, lse.shape
    ((2, 5, 4, 24), (2, 5, 4))
    """
    batch, tokens, heads, nope = _shape("q_nope", q_nope, "B T N H")
    rope = _shape("q_rope", q_rope, "B T N P")[-1]
    slots, value_dim = _shape("value", value, "B S N V")[1::2]
    _expect("q_rope", q_rope, (batch, tokens, heads, rope), "B T N P")
    _expect("k_nope", k_nope, (batch, slots, heads, nope), "B S N H")
    _expect("k_rope", k_rope, (batch, slots, rope), "B S P")
    _expect("value", value, (batch, slots, heads, value_dim), "B S N V")
    dtype = _common_dtype(q_nope=q_nope, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, value=value)
    options = _options(
        batch, tokens, slots, heads, lengths=lengths, soft_cap=soft_cap, window=window, mask=mask,
        segment_ids=segment_ids,
    )  # fmt: skip
    spec = Spec(
        "expanded_attention", batch, tokens, slots, heads, (nope, rope), value_dim, dtype, options
    )
    backend = _choose(_EXPANDED, spec, implementation)
    with jax.named_scope(f"expanded_attention.{backend}"):
        return _EXPANDED[backend].expanded_attention(
            q_nope, q_rope, k_nope, k_rope, value, lengths=lengths, scale=scale,
            soft_cap=soft_cap, window=window, mask=mask, segment_ids=segment_ids,
            precision=precision,
        )  # fmt: skip


def explain(
    config: MLAConfig,
    *,
    batch_size: int = 1,
    length: int = 4096,
    queries: int = 1,
    dtype="bfloat16",
    device: jax.Device | None = None,
) -> None:
    """Prints which form and backend would run for these shapes, and why the others would not.

    Args:
        config: the layer.
        batch_size: B, rows decoded together.
        length: S, slots of the cache.
        queries: T, new tokens of a step.
        dtype: of the cache and the computation.
        device: where; None is the default device.

    Raises:
        ValueError: a number below 1, or a dtype that is not floating.

    >>> v3, cpu = MLAConfig.from_preset("deepseek_v3"), jax.devices("cpu")[0]
    >>> explain(v3, device=cpu)  # doctest: +ELLIPSIS
    cpu (cpu), bfloat16
    step of 1 token(s) per row on 1 x 4096 slots: absorbed (absorbed up to ...
    latent_attention (cached tokens):
    ...
    """
    from mla_jax import costs  # costs imports config; imported here to keep ops free of it

    for key, value in (("batch_size", batch_size), ("length", length), ("queries", queries)):
        if value < 1:
            raise ValueError(f"{key}={value!r}: it must be at least 1.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={jnp.dtype(dtype).name!r}: it must be of floating numbers.")
    device = default_device() if device is None else device
    name = jnp.dtype(dtype).name
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    form = costs.choose_form(config, queries=queries, slots=length)
    crossover = costs.crossover_queries(config, slots=length)
    print(f"{device.device_kind} ({device.platform}), {name}")
    print(
        f"step of {queries} token(s) per row on {batch_size} x {length} slots: {form} "
        f"(absorbed up to {crossover:.0f} tokens, expanded above)"
    )
    specs = {
        "latent_attention": (_LATENT, config.kv_lora_rank, config.kv_lora_rank, ("lengths",)),
        "expanded_attention": (_EXPANDED, config.qk_nope_head_dim, config.v_head_dim, ()),
    }
    for op, (backends, key_dim, value_dim, options) in specs.items():
        slots = length if op == "latent_attention" else queries
        spec = Spec(
            op, batch_size, queries, slots, heads, (key_dim, rope), value_dim, name, options
        )
        used = "cached tokens" if op == "latent_attention" else "the new tokens among themselves"
        print(f"{op} ({used}):")
        chosen = False
        for backend, module in backends.items():
            reason = module.why_not(spec, device)
            if reason is not None:
                print(f"  {backend}: no: {reason}")
            elif chosen:
                print(f"  {backend}: could serve, comes later in the order of preference")
            else:
                print(f"  {backend}: runs")
                chosen = True


def default_device() -> jax.Device:
    """The device that un-placed computations run on, or that is being compiled for."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if getattr(abstract, "platform", None) is not None:
        return abstract
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device


def check_implementation(name: str | None) -> None:
    """Raises ValueError unless `name` is None or a backend's name."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r} is not known: it must be None (choose) or one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )


def serving(op: str, name: str | None) -> str | None:
    """`name` if it is a backend of `op`, else None: one setting of a layer covers both ops."""
    return name if name in (_LATENT if op == "latent_attention" else _EXPANDED) else None


def _choose(backends: dict[str, types.ModuleType], spec: Spec, name: str | None) -> str:
    check_implementation(name)
    device = default_device()
    if name is not None:
        if name not in backends:
            raise NotImplementedError(
                f"implementation={name!r} does not serve {spec.op}: use one of "
                f"{', '.join(backends)}."
            )
        reason = backends[name].why_not(spec, device)
        if reason is not None:
            raise NotImplementedError(f"implementation={name!r}: {reason}")
        return name
    return next(name for name, module in backends.items() if module.why_not(spec, device) is None)


def _shape(name: str, array: Array, letters: str) -> tuple[int, ...]:
    if array.ndim != len(letters.split()):
        raise ValueError(f"{name} has shape {array.shape}: it must be [{letters}].")
    return array.shape


def _expect(name: str, array: Array, shape: tuple[int, ...], letters: str) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}: it must be [{letters}] = {shape} to go with the "
            "other arguments."
        )


def _common_dtype(**arrays: Array) -> str:
    names = {name: jnp.dtype(array.dtype).name for name, array in arrays.items()}
    for name, dtype in names.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is {dtype}: attention takes {', '.join(_DTYPES)}.")
    if len(set(names.values())) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
        raise ValueError(f"mixed dtypes: {given}. Cast them to one, that of the cache.")
    return next(iter(names.values()))


def _options(batch, tokens, slots, heads, *, lengths, soft_cap, window, mask, segment_ids):
    """Validates the optional arguments; the names of those in use, sorted."""
    if tokens == 0 or slots == 0:
        raise ValueError(f"T = {tokens} query tokens, S = {slots} slots: both must be at least 1.")
    used = []
    if lengths is not None:
        lengths = jnp.asarray(lengths) if isinstance(lengths, np.ndarray | list) else lengths
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths is {lengths.dtype}: it must be an integer array.")
        if lengths.shape not in ((batch,), (batch, tokens)):
            raise ValueError(
                f"lengths has shape {lengths.shape}: it must be [B] = ({batch},) or "
                f"[B T] = ({batch}, {tokens})."
            )
        # numpy: under jit, jax would trace the comparison even of a constant
        if not isinstance(lengths, jax.core.Tracer) and (np.asarray(lengths) > slots).any():
            raise ValueError(f"lengths={np.asarray(lengths)} go beyond the S = {slots} slots.")
        used.append("lengths" if lengths.ndim == 1 else "lengths per query")
    if soft_cap is not None:
        if not soft_cap > 0:
            raise ValueError(f"soft_cap={soft_cap}: it must be positive, or None.")
        used.append("soft_cap")
    if window is not None:
        if not window >= 1:
            raise ValueError(f"window={window}: it must be at least 1, or None.")
        used.append("window")
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask is {mask.dtype}: it must be boolean, True = may attend.")
        full = (batch, heads, tokens, slots)
        if mask.ndim != 4 or any(m not in (1, f) for m, f in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"mask has shape {mask.shape}: not broadcastable to {full}, [B N T S]."
            )
        used.append("mask")
    if segment_ids is not None:
        if segment_ids.shape != (batch, slots):
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}: it must be [B S] = {(batch, slots)}."
            )
        used.append("segment_ids")
    return tuple(sorted(used))
