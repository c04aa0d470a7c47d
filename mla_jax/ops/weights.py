"""Products with weights as a checkpoint stores them: small numbers, and a scale for every block.

    y[m] = sum_k x[k] values[m, k] scale[m // rows, k // columns]

What multiplies is of x's dtype, but no copy of all values in it ever stands in memory:

* fused: on a GPU, XLA converts the values within the product. Scales of whole rows multiply its
  result; those of blocks multiply one result for every block of K, which are summed. That is for
  few tokens: M numbers a block of K would outgrow the weights.
* by tile: some rows of W at a time are dequantised and multiplied, in a loop.
* by a kernel: for up to 64 tokens on a Hopper GPU (`ops.experts.few`).

Letters: T tokens, M outputs, K inputs (torch's [out, in]), E experts, N heads, R latent, H and V
channels of a head.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from mla_jax import target
from mla_jax.ops.guard import alike

_FEW = 16  # tokens up to which a result for every block of K is smaller than the weights
_TILE = 2**22  # numbers dequantised at once
_ROWS = 8  # tokens that XLA multiplies as matrices: see `ops.dense`
_UNCUT = 128  # tokens whose product takes less time than a copy of half of its weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix, or one for every expert, in fp8, int8 or int4.

    Attributes:
        values: [*E M K].
        scale: float32 [*E m k], of every block.
        block: rows and columns that share a scale; None is all of that axis. The last block of an
            axis may be a part of one.

    >>> weight = Weight(jnp.array([[2, -3]], jnp.int8), jnp.array([[0.5]]), (1, None))
    >>> weight.dense(jnp.float32), matmul(jnp.array([[1.0, 10.0]]), weight)
    (Array([[ 1. , -1.5]], dtype=float32), Array([[-14.]], dtype=float32))
    """

    values: Num[Array, "*E M K"]
    scale: Float[Array, "*E m k"]
    block: tuple[int | None, int | None] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def columns(self) -> int:
        """Inputs that share a scale."""
        return self.block[1] or self.shape[-1]

    def dense(self, dtype) -> Float[Array, "*E M K"]:
        """The numbers: products in float32, rounded once."""
        step, width = self.columns, self.shape[-1]
        factors = self.row_scales()
        if factors.shape[-1] > 1 and step > 1:
            factors = jnp.repeat(factors, step, axis=-1)[..., :width]
        return (self.values.astype(jnp.float32) * factors).astype(dtype)

    def row_scales(self) -> Float[Array, "*E #M k"]:
        """The scales of every row, or of all where they are the same."""
        step, rows = self.block[0] or self.shape[-2], self.shape[-2]
        if self.scale.shape[-2] == 1 or step == 1:
            return self.scale
        return jnp.repeat(self.scale, step, axis=-2)[..., :rows, :]

    def expert(self, index) -> "Weight":
        """The matrix of one expert."""
        return dataclasses.replace(self, values=self.values[index], scale=self.scale[index])

    def stacked(self) -> "Weight":
        """A matrix as that of the only expert."""
        return dataclasses.replace(self, values=self.values[None], scale=self.scale[None])


def matmul(
    x: Float[Array, "*B K"], weight: Weight, *, precision=None, kernel: bool = True
) -> Float[Array, "*B M"]:
    """X W^T, accumulated in float32, in x's dtype; without `kernel` through XLA everywhere."""
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    y = (_matmul if kernel else _by_xla)(flat, weight, precision)
    return y.astype(x.dtype).reshape(*lead, -1)


def matmuls(
    x: Float[Array, "*B K"], weights: Sequence[Weight], *, precision=None
) -> list[Float[Array, "*B _"]]:
    """`matmul` of x and each weight; by one kernel, where it serves them and they are stored alike.

    >>> weight = Weight(jnp.array([[2, -3]], jnp.int8), jnp.array([[0.5]]), (1, None))
    >>> [y.tolist() for y in matmuls(jnp.array([[1.0, 10.0]]), [weight, weight])]
    [[[-14.0]], [[-14.0]]]
    """
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    kinds = {(weight.values.dtype, weight.block) for weight in weights}
    plans = [_few_rows(flat, weight) for weight in weights]
    if len(kinds) > 1 or None in plans:
        return [matmul(x, weight, precision=precision) for weight in weights]
    made = _by_kernel(plans[0], precision, *alike(flat, tuple(weights)))
    return [y.reshape(*lead, -1) for y in made]


def order_for(weight: Weight, dtype, tokens: int = 1) -> int | None:
    """How what meets a weight may be brought into order: the `row` of `ops.hopper.order.in_order`.

    None where no kernel that asks for an order serves so many tokens of this dtype.

    >>> order_for(Weight(jnp.zeros((64, 64), jnp.int8), jnp.ones((64, 1)), (1, None)), "bfloat16")
    """
    if _few_plan(tokens, dtype, weight) is None:
        return None
    from mla_jax.ops.experts import few

    return few.row_of((weight,))


def _matmul(x, weight, precision):
    few = _few_rows(x, weight)
    if few is None:
        return _by_xla(x, weight, precision)
    return _by_kernel(few, precision, *alike(x, (weight,)))[0]


def _few_rows(x, weight):
    return _few_plan(x.shape[0], x.dtype, weight)


def _few_plan(rows, dtype, weight):
    """The plan of the Hopper kernel for few rows; None where it does not serve."""
    here = target.current()
    outputs, inputs = weight.shape[-2:]
    if not isinstance(rows, int) or outputs % 64 or inputs % 64:
        return None
    from mla_jax.ops.experts import hopper  # it imports this module

    kind = (jnp.dtype(weight.values.dtype).name, weight.block)
    return hopper.few_plan(rows, jnp.dtype(dtype).name, kind, here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(plan, precision, x, weights):
    del precision
    from mla_jax.ops.experts import few

    kernels = tuple(weight.stacked() for weight in weights)
    made = few.linears(few.padded(x, kernels, plan.rows), kernels, plan=plan)
    return tuple(y[: x.shape[0]] for y in made)


def _kernel_forward(plan, precision, x, weights):
    return _by_kernel(plan, precision, x, weights), (x, weights)


def _kernel_backward(plan, precision, residuals, dy):
    x, weights = residuals
    plain = lambda x: tuple(_by_xla(x, w, precision).astype(x.dtype) for w in weights)  # noqa: E731
    return jax.vjp(plain, x)[1](dy)[0], None


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


def _by_xla(x, weight, precision):
    gpu = target.current().platform == "gpu"
    by_row = weight.scale.shape[-1] == 1
    few = isinstance(x.shape[0], int) and x.shape[0] <= _FEW
    if not gpu or not (by_row or (few and x.shape[1] % weight.columns == 0)):
        return _by_tile(x, weight, precision)
    count = x.shape[0]
    if count == 1:
        x = jnp.pad(x, ((0, _ROWS - 1), (0, 0)))
    values = weight.values.astype(x.dtype)
    if by_row:
        product = _einsum("TK,MK->TM", precision)(x, values)
        y = product * jnp.swapaxes(weight.row_scales(), -1, -2)
    else:
        cut = lambda array: array.reshape(array.shape[0], -1, weight.columns)  # noqa: E731
        parts = _einsum("Tkc,Mkc->kTM", precision)(cut(x), cut(values))
        y = (parts * weight.row_scales().T[:, None]).sum(0)
    return y[:count]


def _by_tile(x, weight, precision):
    outputs, width = weight.shape
    step = weight.block[0] or outputs
    tile = max(1, _TILE // width // step) * step if weight.block[0] else max(1, _TILE // width)
    tile = min(tile, outputs)
    count, rest = divmod(outputs, tile)

    held = weight.values
    # XLA for CPUs has no fp8: it would make all values float16 before the loop. Bits it cuts.
    as_bits = target.current().platform == "cpu" and jnp.issubdtype(held.dtype, jnp.floating)
    bits = lax.bitcast_convert_type(held, jnp.uint8) if as_bits else held

    def part(first, rows):
        values = lax.dynamic_slice_in_dim(bits, first, rows, axis=0)
        values = lax.bitcast_convert_type(values, held.dtype) if as_bits else values
        scale = weight.scale
        if scale.shape[0] > 1:
            scale = lax.dynamic_slice_in_dim(scale, first // step, -(-rows // step), axis=0)
        block = (min(step, rows), weight.block[1]) if weight.block[0] else weight.block
        return _einsum("TK,MK->TM", precision)(x, Weight(values, scale, block).dense(x.dtype))

    if count == 1:
        whole = part(0, tile)
    else:
        starts = jnp.arange(count, dtype=jnp.int32) * tile
        # [count T tile] to [T count tile].
        whole = lax.map(lambda first: part(first, tile), starts)
        whole = jnp.moveaxis(whole, 0, 1).reshape(x.shape[0], -1)
    if rest:
        whole = jnp.concatenate([whole, part(count * tile, rest)], axis=-1)
    return whole


def fold_keys(
    query: Float[Array, "B T N H"], weight: Weight, *, precision=None
) -> Float[Array, "B T N R"]:
    """Queries with W_UK folded in; the weight's rows are those of every head's [H + V].

    Scales of rows multiply the queries, those of blocks the result, or, where a head's rows lie in
    several blocks, a copy of the queries for every block of R.
    """
    heads, channels = query.shape[-2:]
    by_row, own = weight.scale.shape[-1] == 1, _of_whole_heads(weight, heads, 0, channels)
    if not by_row and own is None:
        values, scales = _of_heads(weight, heads)
        scaled = query[..., None] * scales[None, None, :, :channels].astype(query.dtype)
        folded = _einsum("BTNHk,NHkc->BTNkc", precision)(
            scaled, values[:, :channels].astype(query.dtype)
        )
        return folded.astype(query.dtype).reshape(*query.shape[:-1], -1)
    values, factors = _heads_of(weight, heads)
    if by_row:
        query = (query * factors[None, None, :, :channels, 0]).astype(query.dtype)
    if _uncut(query):
        rest = values.shape[1] - channels
        query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, rest)))
    else:
        values = values[:, :channels]
    folded = _einsum("BTNH,NHR->BTNR", precision)(query, values.astype(query.dtype))
    return (folded if by_row else _scaled(folded, own)).astype(query.dtype)


def unfold_values(
    mixed: Float[Array, "B T N R"], weight: Weight, value_dim: int, *, precision=None
) -> Float[Array, "B T N V"]:
    """Values of every head from mixed latents; the weight's rows are each head's [H + V]."""
    heads, rows = mixed.shape[-2], weight.shape[0] // mixed.shape[-2]
    by_row = weight.scale.shape[-1] == 1
    own = _of_whole_heads(weight, heads, rows - value_dim, rows)
    if not by_row and own is None:
        values, scales = _of_heads(weight, heads)
        values, scales = values[:, -value_dim:], scales[:, -value_dim:]
        parts = _einsum("BTNkc,NVkc->BTNVk", precision)(
            mixed.reshape(*mixed.shape[:-1], *values.shape[-2:]), values.astype(mixed.dtype)
        )
        return (parts * scales[None, None]).sum(-1).astype(mixed.dtype)
    values, factors = _heads_of(weight, heads)
    if not by_row:
        mixed = _scaled(mixed, own).astype(mixed.dtype)
    uncut = _uncut(mixed)
    values = values if uncut else values[:, -value_dim:]
    made = _einsum("BTNR,NVR->BTNV", precision)(mixed, values.astype(mixed.dtype))
    made = made[..., -value_dim:] if uncut else made
    if by_row:
        made = made * factors[None, None, :, -value_dim:, 0]
    return made.astype(mixed.dtype)


def _uncut(x) -> bool:
    """Whether a product takes a head's keys and values both, and leaves half of it.

    XLA for GPUs widens 8-bit numbers within a product, but would cut them out of an array by a
    kernel of its own. For few tokens that takes longer than the product.
    """
    tokens = math.prod(x.shape[:2])
    return target.current().platform == "gpu" and isinstance(tokens, int) and tokens <= _UNCUT


def _of_whole_heads(weight, heads, start, stop):
    """Scales [N k] that rows start to stop of each head share; None where they share none."""
    rows, blocks = weight.shape[0] // heads, weight.scale.shape[-1]
    if weight.shape[1] % weight.columns:
        return None
    if weight.scale.shape[-2] == 1:
        return jnp.broadcast_to(weight.scale, (heads, blocks))
    step = weight.block[0]
    if rows % step or start // step != (stop - 1) // step:
        return None
    return weight.scale.reshape(heads, rows // step, blocks)[:, start // step]


def _scaled(x, scales):
    """X [B T N R] times scales [N k] of blocks of R, in float32."""
    cut = x.reshape(*x.shape[:-1], scales.shape[-1], -1)
    return (cut * scales[None, None, :, :, None]).reshape(x.shape)


def _heads_of(weight, heads):
    """Values [N H+V R], and the scales [N H+V k] of their rows."""
    rows, width = weight.shape
    scales = jnp.broadcast_to(weight.row_scales(), (rows, weight.scale.shape[-1]))
    return weight.values.reshape(heads, -1, width), scales.reshape(heads, rows // heads, -1)


def _of_heads(weight, heads):
    """Values [N H+V k c] and scales [N H+V k] in blocks of R; one block where they do not fit."""
    rows, width = weight.shape
    if width % weight.columns:  # its last block is a part of one: dequantised
        one = jnp.ones((heads, rows // heads, 1), jnp.float32)
        return weight.dense(jnp.float32).reshape(heads, -1, 1, width), one
    scales = jnp.broadcast_to(weight.row_scales(), (rows, weight.scale.shape[-1]))
    blocks = weight.scale.shape[-1]
    values = weight.values.reshape(heads, rows // heads, blocks, width // blocks)
    return values, scales.reshape(heads, rows // heads, blocks)


def _einsum(letters, precision):
    wide = jnp.float32
    return functools.partial(jnp.einsum, letters, precision=precision, preferred_element_type=wide)
