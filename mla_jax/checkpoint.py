"""Hugging Face attention weights to and from a layer's parameters.

Torch stores a linear as [out, in] with the heads flattened into one axis, per head first the nope,
then the rotary or value channels. Here kernels are [in, ...] with the heads an axis of their own.
The rotary channels keep the checkpoint's order: `MLAConfig.rope_interleave` says which it is.

Letters: N heads, D hidden size, Q q_lora_rank, R kv_lora_rank, H nope, P rotary, V value channels.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from mla_jax.attention import MultiHeadLatentAttention

# Hugging Face's name of each of the layer's submodules, relative to "self_attn.".
_MODULES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}


def load_attention(layer: MultiHeadLatentAttention, tensors: Mapping[str, Array]) -> None:
    """Fills a layer's parameters in place, each cast to the layer's param_dtype.

    Args:
        layer: its config must be the checkpoint's.
        tensors: Hugging Face names relative to "self_attn." to arrays in torch's [out, in] layout:
            q_a_proj.weight [Q D], q_a_layernorm.weight [Q], q_b_proj.weight [N(H+P) Q] (or
            q_proj.weight [N(H+P) D]), kv_a_proj_with_mqa.weight [R+P D],
            kv_a_layernorm.weight [R], kv_b_proj.weight [N(H+V) R], o_proj.weight [D NV], and
            q_a_proj.bias, kv_a_proj_with_mqa.bias, o_proj.bias where attention_bias is set.

    Raises:
        ValueError: a name missing or left over, or a shape that is not the layer's. Nothing is
            changed then.
    """
    expected = dict(_parameters(layer))
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"these tensors are not the layer's: missing {missing}, unexpected {unexpected}. "
            "Does the layer's config belong to this checkpoint?"
        )
    loaded = {}
    for name, parameter in expected.items():
        # numpy's view of the array: jax would round a float64 or copy it to a device first.
        tensor = np.asarray(tensors[name])
        shape = _torch_shape(name, parameter)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tensor.shape}: this layer needs {shape}.")
        kernel = tensor.T if name.endswith("proj.weight") or "with_mqa.weight" in name else tensor
        loaded[name] = jnp.asarray(kernel.reshape(parameter.shape), parameter.dtype)
    for name, parameter in expected.items():
        parameter[...] = loaded[name]


def attention_tensors(layer: MultiHeadLatentAttention) -> dict[str, np.ndarray]:
    """The inverse of `load_attention`: the layer's parameters under Hugging Face's names."""
    tensors = {}
    for name, parameter in _parameters(layer):
        value = np.asarray(parameter[...])
        if value.ndim > 1 and name.endswith(".weight"):
            shape = _torch_shape(name, parameter)
            value = value.reshape(shape[::-1]).T
        tensors[name] = np.ascontiguousarray(value.reshape(_torch_shape(name, parameter)))
    return tensors


def _parameters(layer: MultiHeadLatentAttention) -> Iterator[tuple[str, Any]]:
    for ours, theirs in _MODULES.items():
        module = getattr(layer, ours, None)
        if module is None:
            continue
        if isinstance(module, nnx.RMSNorm):
            yield f"{theirs}.weight", module.scale
            continue
        yield f"{theirs}.weight", module.kernel
        if module.bias is not None:
            yield f"{theirs}.bias", module.bias


def _torch_shape(name: str, parameter: nnx.Param) -> tuple[int, ...]:
    shape = parameter.shape
    if len(shape) == 1:
        return shape
    inputs = 2 if name.startswith("o_proj") else 1  # o_proj takes heads and channels
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
