"""Gated MLPs of a few tokens on Hopper GPUs: weights are the left side of every product.

For up to 64 tokens an expert's products are bound by its weights' bytes. So nothing is sorted: each
expert that some token has chosen multiplies all tokens, which are the columns of the matrix unit,
and XLA takes from the result what each token asked for. The shared expert, which all tokens see,
goes through the same products as one expert more:

    gate_up   silu(x gate) * (x up)          down   hidden down

Both are phases of one kernel (`products.py`), unless 8-bit weights have scales of rows.
`linears` are single matrices that meet the same x, whose inputs several thread blocks share out.

Weights are 16-bit, [K N] as a layer has them; or, as a checkpoint stores them, 8 bits wide, [N K]
with scales: they come into shared memory as they are stored, and are made 16-bit in registers, from
where the matrix unit takes its left side. 8-bit numbers are exact there. Scales of blocks multiply
a block's sums in float32, those of rows the whole sum. More than 32 tokens with such weights come
sorted into tiles, each tile at a place of its own; then the shared expert has places, too.

Letters: J chosen experts, M tokens (8, 16, 32 or 64, padded), E experts, K inputs, N outputs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_jax.ops.experts import products
from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.products import DEPTH, WIDTH, Phase, outputs_of, row_of, steps_of
from mla_jax.ops.experts.ring import Plan
from mla_jax.ops.experts.tiles import Chosen, Tiles
from mla_jax.ops.hopper.order import in_order, restored
from mla_jax.ops.weights import Weight

ROWS = (8, 16, 32, 64)  # M
_TOGETHER = 32  # tokens up to which all meet every expert that is stored in 8 bits

Kernel = Float[Array, "_ _ _"] | Weight  # [E K N], of two groups of experts: E and N may differ


def rows_of(tokens: int) -> int:
    """M for so many tokens, at most 64."""
    return next(rows for rows in ROWS if tokens <= rows)


def tile_rows(call: Call) -> int:
    """M for the experts of a call: `call.tokens` or more where all of them meet every expert.

    To 8-bit weights more than 32 tokens would add half of their bytes or more. They come sorted
    into tiles, of which most experts need one: twice an expert's tokens in the mean.
    """
    if not call.stored or call.tokens <= _TOGETHER:
        return rows_of(call.tokens)
    return next((rows for rows in ROWS if rows * call.experts >= 2 * call.pairs), max(ROWS))


def why_not_stored(stored: tuple[str, tuple], dtype: str) -> str | None:
    """Why weights of this dtype and these blocks are not taken, or None."""
    kind, (rows, columns) = stored
    if dtype != "bfloat16":
        return f"takes weights as a checkpoint stores them in bfloat16, not in {dtype}"
    if kind not in ("float8_e4m3fn", "int8"):
        return f"takes no weights in {kind}"
    whole = columns is None and rows in (None, 1)
    if not whole and (not rows or not columns or rows % WIDTH or columns % DEPTH[1]):
        return f"takes scales of rows, or of blocks of {WIDTH} x {DEPTH[1]}, not {rows} x {columns}"
    return None


def order_of(kernels: Sequence[Kernel]) -> int | None:
    """How `gate_up` may leave hidden states so that products with these kernels take them as is.

    Their thread blocks read activations in the order of `in_order`, which XLA would make by a
    kernel. None where `gate_up` cannot: scales of rows would have to go along.
    """
    by_block = all(isinstance(k, Weight) and k.block[1] is not None for k in kernels)
    return row_of(kernels) if by_block else None


def padded(x: Float[Array, "B K"], kernels: Sequence[Kernel], rows: int) -> Float[Array, "_ K"]:
    """X with so many rows, zeros behind its own, for products with these kernels.

    Where they ask for an order x is brought into it before: what makes x may then do that, and what
    else takes x in order has it from there.
    """
    return _moved(lambda x: jnp.pad(x, ((0, rows - len(x)), (0, 0))), x, kernels)


def sorted_rows(
    x: Float[Array, "B K"], kernels: Sequence[Kernel], tiles: Tiles
) -> Float[Array, "L K"]:
    """X's rows as `tiles` has them, in an order as in `padded`."""
    return _moved(tiles.rows_of, x, kernels)


def _moved(move, x, kernels):
    if not isinstance(kernels[0], Weight):
        return move(x)
    row = row_of(kernels)
    return restored(move(in_order(x, row)), row)


@functools.partial(jax.jit, static_argnames=("plan", "order"))
def gate_up(
    x: tuple[Float[Array, "_ K"], ...],
    kernels: tuple[tuple[Kernel, Kernel], ...],
    chosen: Chosen | None,
    *,
    plan: Plan,
    order: int | None = None,
) -> tuple[Float[Array, "_ _"], ...]:
    """`silu(x gate) * (x up)`, in x's dtype.

    Args:
        x: tokens [M K], which all kernels meet. Or, where every place has tokens of its own, these
            [L K], and behind them what the shared expert meets, some times `plan.rows` tokens.
        kernels: gate and up of the experts, and, where there is one, of the shared expert [1 K N].
        chosen: which experts; None where there is the shared one alone.
        plan: `plan.rows` is M.
        order: of the result's N, as `order_of` the kernels behind says; both must be by blocks.

    Returns:
        of every chosen expert, what is behind those in use being anything; of the shared one.
    """
    return tuple(products.run([_gate_up(x, kernels, chosen, plan, order)], "few_gate_up"))


@functools.partial(jax.jit, static_argnames=("plan", "ordered"))
def down(
    x: tuple[Float[Array, "_ _"], ...],
    kernels: tuple[Kernel, ...],
    chosen: Chosen,
    *,
    plan: Plan,
    ordered: bool = False,
) -> tuple[Float[Array, "_ _"], ...]:
    """Each expert's hidden states times its kernel; arguments as in `gate_up`.

    `ordered` says that they come in `order_of(kernels)`.

    A shared expert some times as wide as the others is cut into so many parts, which thread blocks
    take like experts: its result is their sum, in float32.
    """
    phase = _down(x, kernels, chosen, plan, ordered)
    return _summed(products.run([phase], "few_down"), phase.splits)


@functools.partial(jax.jit, static_argnames=("plan",))
def gated_mlps(
    x: tuple[Float[Array, "_ K"], ...],
    kernels: tuple[tuple[Kernel, Kernel], ...],
    downs: tuple[Kernel, ...],
    chosen: Chosen,
    *,
    plan: Plan,
) -> tuple[Float[Array, "_ _"], ...]:
    """`down` behind `gate_up`: in one kernel, unless 8-bit weights have scales of rows."""
    order = order_of(downs)
    first = _gate_up(x, kernels, chosen, plan, order)
    ordered = order is not None or not first.stored
    second = _down(tuple(first.out), downs, chosen, plan, True, beside=x[0])
    if ordered and products.fit(first, second):
        made = products.run([first, second], "few_experts")[len(first.out) :]
        return _summed(made, second.splits)
    hidden = tuple(products.run([first], "few_gate_up"))
    return down(hidden, downs, chosen, plan=plan, ordered=ordered)


@functools.partial(jax.jit, static_argnames=("plan", "ordered"))
def linears(
    x: Float[Array, "M K"], kernels: tuple[Kernel, ...], *, plan: Plan, ordered: bool = False
) -> tuple[Float[Array, "M _"], ...]:
    """X times each kernel [1 K N], in x's dtype; K and N are multiples of 64.

    `ordered` is as in `down`.
    """
    parts = sum(-(-outputs_of(kernel) // WIDTH) for kernel in kernels)
    steps = steps_of(kernels[0])
    # As many items as multiprocessors, or nearly, each of at least two steps.
    fitting = [n for n in range(1, steps // 2 + 1) if steps % n == 0 and n * parts <= plan.cores]
    split = max(fitting, default=1)
    result = jnp.float32 if split > 1 else x.dtype
    groups, splits = [(kernel,) for kernel in kernels], (split,) * len(kernels)
    phase = Phase([x], groups, None, _first, plan, splits, result=result, ordered=ordered)
    made = products.run([phase], "few_linear")
    return tuple(_sum(one, split).astype(x.dtype) if split > 1 else one for one in made)


def _gate_up(x, kernels, chosen, plan, order):
    def finish(sums):
        a, b = sums
        return a / (1 + jnp.exp(-a)) * b

    return Phase(x, kernels, chosen, finish, plan, (1,) * len(kernels), order=order)


def _down(x, kernels, chosen, plan, ordered, beside=None):
    steps = [steps_of(kernel) for kernel in kernels]
    splits = (1, *(n // steps[0] if n % steps[0] == 0 else 1 for n in steps[1:]))
    groups = [(kernel,) for kernel in kernels]
    return Phase(x, groups, chosen, _first, plan, splits, ordered=ordered, beside=beside)


def _first(sums):
    return sums[0]


def _summed(made, splits):
    """What `down` has made of the experts, and the sums of the parts of the shared one."""
    return made[0], *(_sum(*one) for one in zip(made[1:], splits[1:], strict=True))


def _sum(made, split):
    """The sum [M N] of the parts of K that lie one below the other, in float32."""
    return made.astype(jnp.float32).reshape(split, -1, made.shape[1]).sum(0)
