"""Hugging Face attention weights to and from one layer's parameters.

Letters: N heads, D hidden size, Q q_lora_rank, R kv_lora_rank, H nope, P rotary, V value channels.
"""

import os
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Array

from mla_jax.checkpoint import names as naming
from mla_jax.checkpoint import saving, stored
from mla_jax.checkpoint.host import THREADS, Shardings, build, each, sharding_of
from mla_jax.checkpoint.names import AttentionTensors
from mla_jax.checkpoint.stored import Stored
from mla_jax.checkpoint.tensors import Entry, Kept, attention_table
from mla_jax.layers.attention import MultiHeadLatentAttention


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
            (`families.styles`). Weights in fp8 or int8 come with their scales, by which they are
            multiplied. `Checkpoint.attention` gives such a mapping.
        sharding: where parameters go: `mla_jax.sharding.Rules` for the mesh in use, one
            `jax.sharding.Sharding` for all, by parameter ("q_b_proj.kernel"), or a function of the
            parameter's path and shape. Each process reads only what its devices hold. None is the
            default device, also for parameters that a mapping leaves out.

    Raises:
        ValueError: a name missing or left over (a scale that nothing is multiplied by, too), or a
            shape that is not the layer's. Nothing is changed then.

    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> other = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(1))
    >>> load_attention(other, attention_tensors(layer))
    >>> bool((other.w_uk == layer.w_uk).all())
    True
    """
    table = {entry.name: entry for entry in attention_table(layer)}
    for entry in table.values():
        if isinstance(entry, Kept):
            raise ValueError(
                f"{entry.path} of this layer keeps another checkpoint's stored form: make a new "
                "layer and load into that."
            )
    if isinstance(tensors, AttentionTensors):
        names = {name: name for name in tensors}
        source = f" of {tensors.prefix} in {tensors.files.path}"
        get, where = tensors.stored, tensors.where
    else:
        arrays = stored.Arrays(tensors)
        names = naming.by_canonical_name(tensors, arrays, None)
        source, where = "", arrays.where
        get = lambda name: stored.stored(name, arrays, None)  # noqa: E731
    missing = sorted(table.keys() - names.keys())
    unexpected = sorted(where(names[name]) for name in names.keys() - table.keys())
    if missing or unexpected:
        raise ValueError(
            f"these tensors{source} are not the layer's: missing {missing}, unexpected "
            f"{unexpected}. Does the layer's config belong to this checkpoint?"
        )
    if isinstance(tensors, AttentionTensors):
        tensors.prefetch()
    loaded = {}
    for name, entry in table.items():
        goal = sharding_of(sharding, entry.path, entry.parameter)
        loaded[name] = read(
            [entry], lambda name: get(names[name]), lambda name: where(names[name]), goal
        )
        if isinstance(tensors, AttentionTensors):
            tensors.release()
    for name, entry in table.items():
        entry.parameter.set_value(loaded[name])


def read(
    entries: list[Entry],
    get: Callable[[str], Stored],
    where: Callable[[str], str],
    sharding=None,
):
    """A parameter from the entries of its table: one, or one an index of its first axis.

    Args:
        entries: of one parameter.
        get: the stored form of a tensor, by its name.
        where: what to call it in an error.
        sharding: where the parameter goes.

    Raises:
        ValueError: a tensor of another shape; the message names it.
    """
    parts = [get(entry.name) for entry in entries]
    for entry, part in zip(entries, parts, strict=True):
        if part.shape != entry.stored_shape:
            raise ValueError(
                f"{where(entry.name)} has shape {tuple(part.shape)}: the config asks for "
                f"{entry.stored_shape}."
            )
    parameter = entries[0].parameter

    def fill(out, index):
        if entries[0].index is None:
            entries[0].fill(parts[0], out, index, THREADS if out.nbytes >= 2**22 else 1)
            return
        first = index[0].start

        def one(at):
            entries[at].fill(parts[at], out[at - first], index[1:])

        each(one, range(first, index[0].stop))

    return build(parameter.shape, parameter.dtype, sharding, fill)


def attention_tensors(
    layer: MultiHeadLatentAttention, *, names: str = "huggingface"
) -> dict[str, np.ndarray]:
    """The inverse of `load_attention`: the layer's parameters under a checkpoint's names.

    Args:
        layer: the layer.
        names: "huggingface", or another of `families.styles`.

    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> tensors = attention_tensors(layer)
    >>> tensors["kv_a_proj_with_mqa.weight"].shape, tensors["kv_b_proj.weight"].shape
    ((80, 128), (256, 64))
    """
    table = attention_table(layer)
    tensors = (tensor for entry in table for tensor in entry.tensors())
    return {naming.rename(tensor.name, names): tensor.value() for tensor in tensors}


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
        path: the folder, made where it is not there. A model in it is replaced as `save_decoder`
            replaces one.
        layers: by index.
        names: as in `attention_tensors`.
        prefix: before every name, "{layer}" being the index.
        shard_bytes: a new file starts before one would grow beyond this.

    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_attention(folder, {0: layer})
    ...     with mla_jax.checkpoint.Checkpoint(folder) as files:
    ...         load_attention(layer, files.attention(0))
    """
    table = [(i, entry) for i, layer in layers.items() for entry in attention_table(layer)]
    tensors = [
        tensor._replace(name=prefix.format(layer=index) + naming.rename(tensor.name, names))
        for index, entry in table
        for tensor in entry.tensors()
    ]
    together = any(entry.spans for _, entry in table)
    saving.write(path, tensors, shard_bytes=shard_bytes, together=together)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, shard_bytes: float = 5e9
) -> None:
    """Writes safetensors files of at most `shard_bytes` (or one tensor) and their index.

    A model in the folder is replaced as `save_decoder` replaces one.

    Raises:
        ValueError: no tensors.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(folder, {"model.norm.weight": np.ones(4, np.float32)})
    ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
    ['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    listed = [
        saving.Tensor(name, np.asarray(value).dtype, np.shape(value), lambda value=value: value)
        for name, value in tensors.items()
    ]
    saving.write(path, listed, shard_bytes=shard_bytes)
