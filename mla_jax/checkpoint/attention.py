"""Hugging Face attention weights to and from a layer's parameters.

Torch stores a linear as [out, in] with the heads flattened into one axis, per head first the nope,
then the rotary or value channels. Here kernels are [in, ...] with the heads an axis of their own.
The rotary channels keep the checkpoint's order: `MLAConfig.rope_interleave` says which it is.

Letters: N heads, D hidden size, Q q_lora_rank, R kv_lora_rank, H nope, P rotary, V value channels.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from mla_jax.checkpoint import names as naming
from mla_jax.checkpoint.files import AttentionTensors, save_tensors
from mla_jax.layers.attention import MultiHeadLatentAttention

THREADS = min(8, os.cpu_count() or 1)
_WORTH_THREADS = 2**22  # bytes
_ROWS = 64  # of 2 bytes: two lines of a cache
_ALIGNMENT = 64  # bytes: what jax needs to take an array over on a CPU

Sharding = jax.sharding.Sharding
Shardings = Sharding | Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Sharding | None]


def load_attention(
    layer: MultiHeadLatentAttention,
    tensors: Mapping[str, Array] | Mapping[str, np.ndarray],
    *,
    sharding: Shardings | None = None,
) -> None:
    """Fills a layer's parameters in place, each cast to the layer's param_dtype.

    The layer may be abstract (`nnx.eval_shape`): then nothing is held twice.

    Args:
        layer: its config must be the checkpoint's.
        tensors: Hugging Face names relative to "self_attn." to arrays in torch's [out, in] layout:
            q_a_proj.weight [Q D], q_a_layernorm.weight [Q], q_b_proj.weight [N(H+P) Q] (or
            q_proj.weight [N(H+P) D]), kv_a_proj_with_mqa.weight [R+P D],
            kv_a_layernorm.weight [R], kv_b_proj.weight [N(H+V) R], o_proj.weight [D NV], and what
            the config adds: biases, g_proj.weight, sinks, k_rope_only_layernorm.weight and
            softmax_scaling.{scale,bias}. Other families' names of these are known too
            (`checkpoint.names`). `Checkpoint.attention` gives such a mapping.
        sharding: where parameters go: one for all, by parameter ("q_b_proj.kernel"), or a function
            of the parameter's path and shape. Each device gets only its part. None is the default
            device, also for parameters that a mapping leaves out.

    Raises:
        ValueError: a name missing or left over, or a shape that is not the layer's. Nothing is
            changed then.

    >>> import mla_jax
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> other = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(1))
    >>> load_attention(other, attention_tensors(layer))
    >>> bool((other.w_uk == layer.w_uk).all())
    True
    """
    given = _by_canonical_name(tensors)
    expected = dict(_parameters(layer))
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    if missing or unexpected:
        source = ""
        if isinstance(tensors, AttentionTensors):
            source = f" of {tensors.prefix} in {tensors.files.path}"
            unexpected = [tensors.where(name) for name in unexpected]
        raise ValueError(
            f"these tensors{source} are not the layer's: missing {missing}, unexpected "
            f"{unexpected}. Does the layer's config belong to this checkpoint?"
        )
    if isinstance(tensors, AttentionTensors):
        tensors.prefetch()
    loaded = {}
    for name, (path, parameter) in expected.items():
        # numpy's view of the array: jax would round a float64 or copy it to a device first.
        tensor = np.asarray(tensors[given[name]])
        shape = _torch_shape(path, parameter.shape)
        if tensor.shape != shape:
            where = tensors.where(name) if isinstance(tensors, AttentionTensors) else name
            raise ValueError(f"{where} has shape {tensor.shape}: this layer needs {shape}.")
        kernel = tensor.T if path.endswith(".kernel") else tensor
        goal = sharding_of(sharding, path, parameter.shape)
        loaded[name] = place(kernel.reshape(parameter.shape), parameter.dtype, goal)
        if isinstance(tensors, AttentionTensors):
            tensors.release()
    for name, (_, parameter) in expected.items():
        parameter.set_value(loaded[name])


def attention_tensors(
    layer: MultiHeadLatentAttention, *, names: str = "huggingface"
) -> dict[str, np.ndarray]:
    """The inverse of `load_attention`: the layer's parameters under a checkpoint's names.

    Args:
        layer: the layer.
        names: "huggingface", or another of `checkpoint.names.STYLES`.

    >>> import mla_jax
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> tensors = attention_tensors(layer)
    >>> tensors["kv_a_proj_with_mqa.weight"].shape, tensors["kv_b_proj.weight"].shape
    ((80, 128), (256, 64))
    """
    tensors = {}
    for name, (path, parameter) in _parameters(layer):
        value = np.asarray(parameter[...])
        shape = _torch_shape(path, parameter.shape)
        value = value.reshape(shape[::-1]).T if path.endswith(".kernel") else value.reshape(shape)
        tensors[naming.rename(name, names)] = np.ascontiguousarray(value)
    return tensors


def save_attention(
    path: str | os.PathLike,
    layers: Mapping[int, MultiHeadLatentAttention],
    *,
    names: str = "huggingface",
    prefix: str = "model.layers.{layer}.self_attn.",
    shard_bytes: float = 5e9,
) -> None:
    """Writes layers' attention as safetensors with an index, which `Checkpoint` reads back.

    Args:
        path: the folder, made where it is not there.
        layers: by index.
        names: as in `attention_tensors`.
        prefix: before every name, "{layer}" being the index.
        shard_bytes: a new file starts before one would grow beyond this.

    >>> import mla_jax
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_attention(folder, {0: layer})
    ...     with mla_jax.checkpoint.Checkpoint(folder) as files:
    ...         load_attention(layer, files.attention(0))
    """
    tensors = {
        prefix.format(layer=index) + name: tensor
        for index, layer in layers.items()
        for name, tensor in attention_tensors(layer, names=names).items()
    }
    save_tensors(path, tensors, shard_bytes=shard_bytes)


def place(
    host: np.ndarray, dtype, sharding: Sharding | None = None, *, take: bool = False
) -> jax.Array:
    """A host array, of any strides, as a jax array; with a sharding only its parts are copied.

    With `take` the array, `empty`'s and of this dtype, is nobody else's and need not be copied.

    >>> import jax.numpy as jnp
    >>> place(np.ones((2, 3)), jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))  # x64 may narrow it
    if sharding is None:
        # The copy is nobody else's: on a CPU it becomes the jax array, without a second one.
        own = host if take else _ordered(host, dtype)
        return jax.block_until_ready(jax.device_put(own, may_alias=True))
    part = lambda index: _ordered(host[index], dtype)  # noqa: E731
    return jax.block_until_ready(jax.make_array_from_callback(host.shape, sharding, part))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A C-ordered array, aligned as jax wants it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    raw = raw[-raw.ctypes.data % _ALIGNMENT :][:size]
    return raw.view(dtype).reshape(shape)


def _ordered(host: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-ordered copy in another dtype, aligned as jax wants it."""
    out = empty(host.shape, dtype)
    copy(host, out, THREADS if out.nbytes >= _WORTH_THREADS else 1)
    return out


def copy(host: np.ndarray, out: np.ndarray, threads: int = 1) -> None:
    """Copies an array of any strides into a C-ordered one."""
    source, target = (_bits(host), _bits(out)) if host.dtype == out.dtype else (host, out)
    if host.ndim < 2 or host.flags.c_contiguous:
        target[...] = source
        return
    # A transposed kernel: written 64 of torch's rows at a time, which stays in cache and is several
    # times as fast as numpy's own order.
    for shape in ((host.shape[0], -1), (-1, host.shape[-1])):
        try:  # the heads' axis and the channels' are one in the file
            source = source.reshape(shape, copy=False)
            target = target.reshape(shape)
            break
        except ValueError:
            continue
    axis = int(np.argmax(source.strides))
    rows = source.shape[axis]
    share = -(-rows // (_ROWS * threads)) * _ROWS

    def part_of(first):
        for start in range(first, min(first + share, rows), _ROWS):
            part = (slice(None),) * axis + (slice(start, min(start + _ROWS, first + share)),)
            target[part] = source[part]

    if threads == 1:
        part_of(0)
    else:  # numpy lets other threads run while it copies
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(part_of, range(0, rows, share)))


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as plain integers, which numpy copies faster than ml_dtypes' numbers."""
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return array.view(kinds[array.dtype.itemsize])


def sharding_of(sharding, path: str, shape: tuple[int, ...]) -> Sharding | None:
    """Where one parameter goes."""
    if callable(sharding):
        return sharding(path, shape)
    return sharding.get(path) if isinstance(sharding, Mapping) else sharding


def _by_canonical_name(tensors: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in tensors:
        if naming.IGNORED.search(name):
            continue
        known = found.setdefault(naming.canonical(name), name)
        if known != name:
            raise ValueError(f"{known} and {name} are the same tensor: give one.")
    return found


def _parameters(layer: MultiHeadLatentAttention) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Hugging Face's name of every parameter, its path in the layer, and itself."""
    for ours, theirs in naming.MODULES.items():
        module = getattr(layer, ours, None)
        if module is None:
            continue
        if isinstance(module, nnx.RMSNorm):
            yield f"{theirs}.weight", (f"{ours}.scale", module.scale)
            continue
        yield f"{theirs}.weight", (f"{ours}.kernel", module.kernel)
        if module.bias is not None:
            yield f"{theirs}.bias", (f"{ours}.bias", module.bias)
    for ours, theirs in naming.VECTORS.items():
        if hasattr(layer, ours):
            yield theirs, (ours, getattr(layer, ours))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not path.endswith(".kernel"):
        return (int(np.prod(shape)),)  # norms, vectors, biases: heads flattened
    inputs = 2 if path.startswith("o_proj") else 1  # o_proj takes heads and channels
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
