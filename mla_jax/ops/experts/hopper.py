"""The experts on Hopper GPUs, forward and backward, for any M: only the chosen experts are read.

Up to 64 tokens go through `few.py` with the shared expert, and with weights as a checkpoint stores
them any number without it. For more XLA gathers each tile's rows between the kernels of
`grouped.py`, and sums each token's outputs. The derivatives of `few.py` are those of the general
way.

The backward pass keeps x and the two products of the gated MLP, x gate and x up, and takes the rest
anew. With s = sigmoid(a), h = a s b, w the pair's weight, and t = dy down^T:

    dw = h . t      da = w t b s (1 + a (1 - s))      db = w t a s      dx = da gate^T + db up^T
    d gate = x^T da      d up = x^T db      d down = (w h)^T dy

Rows that fill a tile up are zeros in x and in dy, hence in everything that the sums over rows see.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size, J tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ops.experts import stored
from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.tiles import Chosen, Tiles, chosen_experts, make_tiles, no_arrivals
from mla_jax.ops.guard import alike
from mla_jax.ops.hopper import multiprocessors, not_hopper
from mla_jax.ops.weights import Weight, matmul
from mla_jax.target import Target

_PARTS = 16  # in which a router's product leaves its sums, as many as XLA has it done by at once
_INTERPRETED_CORES = 2  # enough to share work, few enough to be interpreted on a CPU


@functools.cache
def _modules() -> Any:
    """The kernels' modules, or None for a jax without Mosaic GPU; Pallas takes long to import."""
    try:
        from mla_jax.ops.experts import choice, few, grouped
    except ImportError:
        return None
    return grouped, few, choice


def _grouped() -> Any:
    return _modules()[0]


def _few() -> Any:
    return _modules()[1]


def _choice() -> Any:
    return _modules()[2]


def why_not(call: Call, target: Target) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if reason := not_hopper(target):
        return reason
    if _modules() is None:
        return "this version of jax has no Mosaic GPU"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    if any(width % _grouped().WIDTH for width in call.widths):
        width, inner = call.widths
        return f"widths must be multiples of {_grouped().WIDTH}, not {width} and {inner}"
    if not call.static:
        return "the number of tokens must be static"
    if not call.pairs:
        return "there are no tokens, or none has an expert"
    if call.stored:
        return _few().why_not_stored(call.stored, call.dtype)
    return None


def few_plan(tokens: int, dtype: str, stored: tuple | None, target: Target) -> Any:
    """The plan of `few.py` for one matrix; None where it does not serve.

    Args:
        tokens, dtype: of x.
        stored: dtype and blocks of the weights, or None where they are plain.
        target: where.
    """
    if not_hopper(target) or _modules() is None:
        return None
    if not 1 <= tokens <= max(_few().ROWS):
        return None
    if dtype not in ("bfloat16", "float16"):
        return None
    if stored and _few().why_not_stored(stored, dtype):
        return None
    return _few().Plan(_few().rows_of(tokens), _cores(target), target.interpret)


def _cores(target):
    return _INTERPRETED_CORES if target.interprets else multiprocessors(target)


def takes_shared(call: Call, target: Target) -> bool:
    """Whether `run` takes the shared expert along, for a call that it serves."""
    return why_not(call, target) is None and call.tokens <= max(_few().ROWS)


def choose(scores, count: int, target: Target):
    """`lax.top_k(scores, count)[1]` [M K] and its `Chosen`; None where no kernel serves."""
    tokens, groups = scores.shape
    if not_hopper(target) or _modules() is None or scores.dtype != "float32":
        return None
    if not isinstance(tokens, int) or not 1 <= tokens <= max(_few().ROWS):
        return None
    if not 1 <= count <= groups <= _choice().MOST_SCORES or groups % 8:
        return None
    # The choice has no derivative, and the kernel has no rule.
    return _choice().choose(lax.stop_gradient(scores), count, interpret=target.interpret)


def route(x, kernel, count: int, target: Target):
    """See `ops.experts.route`; None where no kernel serves."""
    (tokens, width), groups = x.shape, kernel.shape[1]
    if not_hopper(target) or _modules() is None or not isinstance(tokens, int):
        return None
    # One thread block reads all parts, with a row of scores in registers.
    few = 1 <= tokens <= 16 and 1 <= count <= groups <= 128 and groups % 8 == 0
    if not few or tokens * groups % 128 or width % _PARTS:
        return None
    cut = x.astype(jnp.float32).reshape(tokens, _PARTS, -1)
    kernel = kernel.reshape(_PARTS, -1, groups)
    parts = jnp.einsum("MLc,LcE->LME", cut, kernel, precision="highest")
    return _routed(count, target.interpret, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _routed(count, interpret, parts):
    return _choice().choose_by_parts(parts, count, interpret=interpret)


def _routed_forward(count, interpret, parts):
    made = _routed(count, interpret, parts)
    return made, (parts, made[0])


def _routed_backward(count, interpret, residuals, cotangents):
    del count, interpret
    parts, experts = residuals

    def weights(parts):
        return jnp.take_along_axis(jax.nn.softmax(parts.sum(0)), experts, axis=-1)

    return jax.vjp(weights, parts)[1](cotangents[1])


_routed.defvjp(_routed_forward, _routed_backward)


def run(
    x,
    experts,
    weights,
    gate,
    up,
    down,
    *,
    precision,
    call: Call,
    target: Target,
    shared=None,
    chosen=None,
):
    """See `routed_experts`."""
    x, experts, weights, gate, up, down, shared, chosen = alike(
        x, experts, weights, gate, up, down, shared, chosen
    )
    cores = _cores(target)
    if call.stored or call.tokens <= max(_few().ROWS):
        plan = _few().Plan(_few().tile_rows(call), cores, target.interpret)
        kernels = [(gate, up, down), *([] if shared is None else [shared])]
        return _of_few(plan, call, target, x, experts, weights, kernels, chosen)
    rows = tile_rows(call)
    plan = _grouped().Plan(rows, cores, target.interpret)
    tiles = make_tiles(experts, call.experts, rows, call.partial)
    return _mixed(plan, call.partial, x, weights, gate, up, down, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _of_few(plan, call: Call, target: Target, x, experts, weights, kernels, chosen):
    count, (tokens, _) = call.experts, x.shape
    if not call.stored:
        kernels = [[kernel.astype(x.dtype) for kernel in group] for group in kernels]
    groups = tuple((gate, up) for gate, up, _ in kernels)
    both = [kernel for pair in groups for kernel in pair]
    if tokens <= plan.rows:
        if chosen is None and count <= _choice().MOST_EXPERTS:
            chosen = _choice().chosen_experts(experts, count, interpret=plan.interpret)
        elif chosen is None:
            chosen = chosen_experts(experts, count)
        xs = (_few().padded(x, both, plan.rows),)
        place = chosen.rank[jnp.minimum(experts, count - 1)] * plan.rows
        place = place + jnp.arange(tokens, dtype=jnp.int32)[:, None]
    else:
        tiles = make_tiles(experts, count, plan.rows, call.partial)
        # Of `rank` kernels read the last number alone.
        chosen = Chosen(tiles.owner, tiles.used, no_arrivals(tiles.owner))
        x_ = _few().padded(x, both, -(-tokens // plan.rows) * plan.rows)
        xs = (_few().sorted_rows(x_, both, tiles), x_)[: len(groups)]
        place = tiles.place
    downs = tuple(down for *_, down in kernels)
    made = _few().gated_mlps(xs, groups, downs, chosen, plan=plan)
    own = made[0][place]
    if call.partial:
        own = jnp.where((experts < count)[..., None], own, 0)
    mixed = (own * weights[..., None]).sum(1)
    if len(made) > 1:
        mixed = mixed + made[1][:tokens]
    return mixed.astype(x.dtype)


def _few_forward(plan, call, target, x, experts, weights, kernels, chosen):
    y = _of_few(plan, call, target, x, experts, weights, kernels, chosen)
    return y, (x, experts, weights, kernels)


def _few_backward(plan, call, target, residuals, dy):
    x, experts, weights, kernels = residuals

    def general(x, weights, kernels):
        (gate, up, down), *shared = kernels
        if call.stored:
            y = stored.run(
                x, experts, weights, gate, up, down, precision=None, partial=call.partial
            )
        else:
            rows = plan._replace(rows=tile_rows(call))
            tiles = make_tiles(experts, call.experts, rows.rows, call.partial)
            y = _mixed(rows, call.partial, x, weights, gate, up, down, tiles)
        for gate, up, down in shared:
            y = y + _alone(x, gate, up, down)
        return y

    if call.stored:  # numbers that are not trained
        dx, dweights = jax.vjp(lambda x, weights: general(x, weights, kernels), x, weights)[1](dy)
        return dx, None, dweights, None, None
    dx, dweights, dkernels = jax.vjp(general, x, weights, kernels)[1](dy)
    return dx, None, dweights, dkernels, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(plan, x, kernels):
    """One gated MLP, kernels [1 D F], [1 D F], [1 F D] or `Weight`s, on a few tokens [M D].

    `plan` is of `few_plan`.
    """
    gate, up, down = kernels
    x_, order = _few().padded(x, (gate, up), plan.rows), _few().order_of((down,))
    (hidden,) = _few().gate_up((x_,), ((gate, up),), None, plan=plan, order=order)
    (y,) = _few().linears(hidden, (down,), plan=plan, ordered=order is not None)
    return y[: len(x)]


def _gated_forward(plan, x, kernels):
    return gated(plan, x, kernels), (x, kernels)


def _gated_backward(plan, residuals, dy):
    del plan
    x, kernels = residuals
    if isinstance(kernels[0], Weight):  # numbers that are not trained
        return jax.vjp(lambda x: _alone(x, *kernels), x)[1](dy)[0], None
    return jax.vjp(lambda x, kernels: _alone(x, *kernels), x, kernels)[1](dy)


gated.defvjp(_gated_forward, _gated_backward)


def _alone(x, gate, up, down):
    """One expert [1 D F] on all tokens."""
    if isinstance(gate, Weight):
        times = lambda x, kernel: matmul(x, kernel.expert(0))  # noqa: E731
    else:
        times = lambda x, kernel: x @ kernel[0].astype(x.dtype)  # noqa: E731
    return times(jax.nn.silu(times(x, gate)) * times(x, up), down)


_of_few.defvjp(_few_forward, _few_backward)


def tile_rows(call: Call) -> int:
    """Rows of a tile: many where an expert's tokens fill half of one in the mean, else few."""
    return _grouped().MANY if call.pairs >= call.experts * _grouped().MANY // 2 else _grouped().FEW


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed(plan, partial, x, weights, gate, up, down, tiles: Tiles):
    return _forward(plan, partial, x, weights, gate, up, down, tiles, save=False)[0]


def _forward(plan, partial, x, weights, gate, up, down, tiles: Tiles, save=True):
    gate_, up_, down_ = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    rows = tiles.rows_of(x)
    hidden, *products = _grouped().gate_up(rows, gate_, up_, tiles, plan=plan, save=save)
    own = tiles.of_pairs(_grouped().product((hidden,), (down_,), tiles, plan=plan), partial)
    mixed = (own * weights[..., None]).sum(1).astype(x.dtype)
    return mixed, (x, weights, gate, up, down, tiles, *products)


def _backward(plan, partial, residuals, dy):
    x, weights, gate, up, down, tiles, a, b = residuals
    wide, narrow = jnp.promote_types(x.dtype, jnp.float32), x.dtype
    gate_, up_, down_ = (kernel.astype(narrow) for kernel in (gate, up, down))
    share = jnp.zeros(tiles.token.shape, wide).at[tiles.place].set(weights, unique_indices=True)
    dy = tiles.rows_of(dy.astype(narrow))
    towards = _grouped().product((dy,), (down_,), tiles, plan=plan, transposed=True).astype(wide)
    # Elementwise in XLA: inside the kernel this was no faster.
    a, b, share = a.astype(wide), b.astype(wide), share[:, None]
    s = jax.nn.sigmoid(a)
    hidden = a * s * b
    dweights = tiles.of_pairs((hidden * towards).sum(1), partial).astype(weights.dtype)
    towards = share * towards
    da = (towards * b * s * (1 + a * (1 - s))).astype(narrow)
    db = (towards * a * s).astype(narrow)
    dx = _grouped().product((da, db), (gate_, up_), tiles, plan=plan, transposed=True)
    dx = tiles.of_pairs(dx, partial).astype(wide).sum(1).astype(narrow)
    dgate, dup = _gradient(plan, tiles.rows_of(x), (da, db), tiles, (gate, up))
    (ddown,) = _gradient(plan, (share * hidden).astype(narrow), (dy,), tiles, (down,))
    return dx, dweights, dgate, dup, ddown, None


def _gradient(plan, x, y, tiles: Tiles, parameters):
    """Gradients of these parameters in their dtypes, of which the kernel writes one."""
    dtypes = {parameter.dtype for parameter in parameters}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float32")
    dtype = dtype if dtype in ("bfloat16", "float16") else jnp.dtype("float32")
    made = _grouped().gradient(x, y, tiles, plan=plan, dtype=dtype)
    return [grad.astype(own.dtype) for grad, own in zip(made, parameters, strict=True)]


_mixed.defvjp(_forward, _backward)
