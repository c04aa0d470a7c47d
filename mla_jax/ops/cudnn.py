"""Causal self-attention of the expanded form through cuDNN's flash attention, on NVIDIA GPUs.

cuDNN takes keys of H + P channels and values of V from Hopper on (cuDNN 9.10); elsewhere values, or
queries and keys, are padded with zeros to the wider of the two. On an H200 (4096 tokens, 128 heads,
192/128) native forward and backward take 0.68 of the padded time. jax's public
`jax.nn.dot_product_attention` refuses unequal widths and rounds lse to the operands' dtype, so the
function below it is called where it is there; where it is not, `why_not` says so and XLA serves.

cuDNN does not promise that gradients repeat bit for bit: its backward may add in any order unless
it is asked for a deterministic algorithm, which XLA does under `--xla_gpu_deterministic_ops`. The
kernels in `ops/hopper/attention` repeat.

Letters: B batch, T tokens, N heads, H key, P rotary, V value channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mla_jax import ops, target

try:
    from jax._src.cudnn import fused_attention_stablehlo  # not public
except ImportError:
    fused_attention_stablehlo = None
_fused: Any = fused_attention_stablehlo


def why_not(call, device: target.Target) -> str | None:
    """Why cuDNN cannot serve `call` on `device`, or None."""
    if device.platform != "gpu" or device.capability is None:
        return f"needs an NVIDIA GPU, this is {device}"
    if _fused is None:
        return "this version of jax has moved its cuDNN attention"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    if call.options or call.soft_cap is not None:
        options = (*call.options, *(["soft_cap"] if call.soft_cap is not None else []))
        return f"plain causal attention only, not with {', '.join(options)}"
    if call.queries != call.slots:
        return f"self-attention only: {call.queries} queries on {call.slots} slots"
    widest = max(sum(call.key_dims), call.value_dim)
    limit = 256 if device.capability >= 9 else 128 if device.capability >= 8 else 0
    if not limit:
        return f"needs compute capability 8.0, this is {device.capability}"
    if widest > limit or sum(call.key_dims) % 8 or call.value_dim % 8:
        return f"head widths must be multiples of 8 up to {limit} on this GPU"
    return None


def expanded_attention(queries, store, seen, call):
    """The expanded form: see `ops.expanded_attention`."""
    del seen  # `why_not` keeps it plain
    return _attention(*queries, store.k_nope, store.k_rope, store.value, call.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_nope, q_rope, k_nope, k_rope, value, scale):
    tokens = q_nope.shape[1]
    if tokens % 2:  # cuDNN's backward wants an even length; causal, so a last token is not seen
        more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        padded = map(more, (q_nope, q_rope, k_nope, k_rope, value))
        out, lse = _attention.fun(*padded, scale)
        return out[:, :tokens], lse[:, :tokens]
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    key = jnp.concatenate([k_nope, shared], axis=-1)
    # Of the device compiled for: the library's own check asks the first one of this process.
    native = _fused.check_cudnn_version() >= 91000 and (target.current().capability or 0) >= 9
    width = value.shape[-1]
    if not native and query.shape[-1] != width:
        widest = max(query.shape[-1], width)
        pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, widest - x.shape[-1])])  # noqa: E731
        query, key, value = pad(query), pad(key), pad(value)
    out, lse = _fused.dot_product_attention(
        query, key, value, scale=scale, mask_type=_fused.MaskType.CAUSAL, return_residual=True
    )
    return out[..., :width], jnp.swapaxes(lse, 1, 2).astype(jnp.float32)


def _forward(q_nope, q_rope, k_nope, k_rope, value, scale):
    arrays = [x.value for x in (q_nope, q_rope, k_nope, k_rope, value)]
    outputs, backward = jax.vjp(functools.partial(_attention.fun, scale=scale), *arrays)
    return outputs, (arrays, backward)


def _backward(scale, residuals: Any, cotangents: Any):
    arrays, backward = residuals
    d_out: Any
    d_lse: Any
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, arrays[0].dtype)
    if isinstance(d_lse, SymbolicZero):  # always, unless the caller uses lse
        outputs = (d_out, jnp.zeros(d_lse.shape, jnp.float32))
        return backward(outputs)
    # cuDNN's backward ignores the derivative of lse without a word; XLA's does not.
    core = functools.partial(ops.expanded_attention, scale=scale, implementation="xla")
    _, exact = jax.vjp(core, *arrays)
    return exact((d_out, d_lse))


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
