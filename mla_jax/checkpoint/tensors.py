"""The table of a model: which tensor of a checkpoint is which part of which parameter.

Loading and saving walk the same table. Torch stores a linear as [out, in] with the heads flattened
into one axis, per head first the nope, then the rotary or value channels; here kernels are
[in, ...] with the heads an axis of their own, and a layer's experts are one array. The rotary
channels keep the checkpoint's order: `MLAConfig.rope_interleave` says which it is.

Letters: N heads, D hidden size, Q q_lora_rank, R kv_lora_rank, H nope, P rotary, V value channels;
E experts, W words.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from mla_jax.checkpoint import host, kept, saving
from mla_jax.checkpoint.stored import Stored
from mla_jax.families import Family
from mla_jax.layers.attention import MultiHeadLatentAttention
from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.layers.indexer import Indexer
from mla_jax.layers.quantised import Quantised
from mla_jax.models.decoder import Decoder
from mla_jax.models.longcat import ShortcutBlock

# Modules of the layer by Hugging Face's names for DeepSeek's, without ".weight" or ".bias".
MODULES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "k_rope_norm": "k_rope_only_layernorm",
    "kv_b_proj": "kv_b_proj",
    "g_proj": "g_proj",
    "o_proj": "o_proj",
}
INDEXER = {  # of the layer's indexer, behind "indexer."
    "wq_b": "wq_b",
    "wk": "wk",
    "k_norm": "k_norm",
    "weights_proj": "weights_proj",
    "q_input_norm": "q_input_norm",
    "ssmax_scale": "softmax_scaling.scale",
    "ssmax_bias": "softmax_scaling.bias",
    "kpool_bias": "index_kpool_compress_ape",
    "kpool_gate": "index_kpool_compress_gate",
}
VECTORS = {  # whole names: these have no ".weight"
    "sinks": "sinks",
    "ssmax_scale": "softmax_scaling.scale",
    "ssmax_bias": "softmax_scaling.bias",
}
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor's place.

    Attributes:
        path: of the parameter in the model, such as "blocks.3.attention.q_b_proj.kernel".
        name: of the tensor.
        parameter: the nnx.Variable.
        index: where on the parameter's first axis the tensor is; None: it is the whole parameter.
        inputs: how many of the part's axes are inputs of a matrix, which torch transposes; None:
            the tensor has the parameter's order.

    >>> from flax import nnx
    >>> kernel = nnx.Param(np.zeros((4, 2, 3)))
    >>> Entry("q_b_proj.kernel", "q_b_proj.weight", kernel, inputs=1).stored_shape
    (6, 4)
    """

    path: str
    name: str
    parameter: Any
    index: int | None = None
    inputs: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part of the parameter."""
        return self.parameter.shape if self.index is None else self.parameter.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Of the parameter."""
        return np.dtype(self.parameter.dtype)

    @property
    def spans(self) -> bool:
        """Whether several processes hold the parameter together."""
        return not self.parameter[...].is_fully_addressable

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        if self.inputs is None:
            matrix = self.path.endswith(("embedding", "kpool_bias"))
            return self.shape if matrix else (math.prod(self.shape),)
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def fill(self, stored: Stored, out: np.ndarray, index: host.Index, threads: int = 1) -> None:
        """Writes the numbers of a part, dequantised, into an array of the parameter's order.

        Args:
            stored: the tensor; of `stored_shape`.
            out: C-ordered, of the shape of the index.
            index: which part, a slice with start and stop per axis.
            threads: that may copy.
        """
        if self.inputs is None:
            if self.stored_shape == self.shape:
                host.copy(stored.read(index), out, threads)
            else:
                out[...] = stored.read().reshape(self.shape)[index]
            return
        columns, inside = _flat(index[: self.inputs], self.shape[: self.inputs])
        rows, behind = _flat(index[self.inputs :], self.shape[self.inputs :])
        whole = inside is None and behind is None
        if stored.form is None:
            part = self._transposed(stored.read((rows, columns)), index, inside, behind)
            host.copy(part, out, threads)
        elif whole:
            target = out.reshape(columns.stop - columns.start, rows.stop - rows.start, copy=False)

            def chunk(few):
                part = stored.read((few, columns), out.dtype)  # its last dtype before it is turned
                host.copy(part.T, target[:, few.start - rows.start : few.stop - rows.start])

            host.each(chunk, stored.chunks(rows, columns), threads)
        else:
            part = stored.read((rows, columns))
            host.copy(self._transposed(part, index, inside, behind), out, threads)

    def _transposed(self, part: np.ndarray, index, inside, behind) -> np.ndarray:
        assert self.inputs is not None
        size = lambda axes, one: [a.stop - a.start for a in axes] if one is None else None  # noqa: E731
        first = size(index[: self.inputs], inside) or self.shape[: self.inputs]
        last = size(index[self.inputs :], behind) or self.shape[self.inputs :]
        value = part.T.reshape(*first, *last)
        axes = [*(inside or [slice(None)] * len(first)), *(behind or [slice(None)] * len(last))]
        return value[tuple(axes)]

    def tensors(self) -> Iterator[saving.Tensor]:
        """What is written of it."""
        yield saving.Tensor(self.name, self.dtype, self.stored_shape, self.value)

    def value(self) -> np.ndarray:
        """The tensor, from the parameter: the inverse of `fill`."""
        value = host.fetch(self.parameter[...], self.index)
        if self.inputs is None:
            return np.ascontiguousarray(value.reshape(self.stored_shape))
        return np.ascontiguousarray(value.reshape(self.stored_shape[::-1]).T)


class Kept(Entry):
    """A weight that is kept as it was stored: `parameter` is the `Quantised` that holds it."""

    @property
    def spans(self) -> bool:
        """Never: on a mesh such weights are refused."""
        return False

    def tensors(self) -> Iterator[saving.Tensor]:
        """Values and scale."""
        yield from kept.written(self.name, self.parameter, self.index)


def _flat(index: host.Index, shape: tuple[int, ...]) -> tuple[slice, host.Index | None]:
    """A slice of flattened axes; where it holds more than the index, the index into that."""
    rest = math.prod(shape[1:])
    if all(i == slice(0, size) for i, size in zip(index[1:], shape[1:], strict=True)):
        return slice(index[0].start * rest, index[0].stop * rest), None
    return slice(0, math.prod(shape)), index


def attention_table(
    layer: MultiHeadLatentAttention, path: str = "", prefix: str = ""
) -> Iterator[Entry]:
    """The table of one layer, under Hugging Face's names behind `prefix`."""
    for ours, theirs in MODULES.items():
        module = getattr(layer, ours, None)
        if module is None:
            continue
        if isinstance(module, nnx.RMSNorm):
            yield Entry(f"{path}{ours}.scale", f"{prefix}{theirs}.weight", module.scale)
            continue
        inputs = 2 if ours == "o_proj" else 1  # o_proj takes heads and channels
        yield _linear(path + ours, f"{prefix}{theirs}.weight", module, inputs)
        if module.bias is not None:
            yield Entry(f"{path}{ours}.bias", f"{prefix}{theirs}.bias", module.bias)
    for ours, theirs in VECTORS.items():
        if hasattr(layer, ours):
            yield Entry(path + ours, prefix + theirs, getattr(layer, ours))
    if layer.config.has_indexer:
        yield from _indexer(layer.indexer, f"{path}indexer.", f"{prefix}indexer.")


def _indexer(indexer: Indexer, path: str, prefix: str) -> Iterator[Entry]:
    for ours, theirs in INDEXER.items():
        part = getattr(indexer, ours, None)
        name = prefix + theirs
        if isinstance(part, nnx.LayerNorm):
            yield Entry(f"{path}{ours}.scale", f"{name}.weight", part.scale)
            yield Entry(f"{path}{ours}.bias", f"{name}.bias", part.bias)
        elif isinstance(part, nnx.Param):
            yield Entry(path + ours, name, part)
        elif part is not None:
            name = name if ours == "kpool_gate" else f"{name}.weight"
            yield Entry(f"{path}{ours}.kernel", name, part.kernel, inputs=1)


def decoder_table(model: Decoder, family: Family, root: str = "model.") -> list[Entry]:
    """The table of a decoder, without head and predictor, in the family's names behind `root`."""
    entries = [Entry("embed.embedding", "embed_tokens.weight", model.embed.embedding)]
    for index, block in enumerate(model.blocks):
        entries += _block(f"blocks.{index}.", block, f"layers.{index}.")
    entries.append(Entry("norm.scale", "norm.weight", model.norm.scale))
    return _named(entries, family, root)


def head_entry(model: Decoder, name: str) -> Entry | None:
    """The head's; None where it is the embedding."""
    if model.head is None:
        return None
    return Entry("head.kernel", name, model.head.kernel, inputs=1)


def predictor_table(model: Decoder, family: Family, root: str = "model.") -> list[Entry]:
    """The table of the block for multi-token prediction, which follows the layers.

    Without its embedding and head: these are often the model's (`predictor_copies`).
    """
    predictor = model.predictor
    assert predictor is not None
    prefix = f"layers.{model.config.attention.num_hidden_layers}."
    entries = [
        Entry(f"predictor.{ours}.scale", f"{prefix}{theirs}.weight", getattr(predictor, ours).scale)
        for ours, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm"))
    ]
    entries.append(_linear("predictor.eh_proj", f"{prefix}eh_proj.weight", predictor.eh_proj, 1))
    entries += _block("predictor.block.", predictor.block, prefix)
    return _named(entries, family, root)


def predictor_copies(model: Decoder, family: Family, root: str = "model.") -> list[Entry]:
    """The predictor's embedding and head: its own, or the model's."""
    predictor = model.predictor
    assert predictor is not None
    prefix = f"layers.{model.config.attention.num_hidden_layers}."
    embed = predictor.embed or model.embed
    entries = [Entry("predictor.embed.embedding", f"{prefix}embed_tokens.weight", embed.embedding)]
    head = predictor.head or model.head
    name = f"{prefix}shared_head.head.weight"
    if head is None:
        entries.append(Entry("predictor.head.embedding", name, model.embed.embedding))
    else:
        entries.append(Entry("predictor.head.kernel", name, head.kernel, inputs=1))
    return _named(entries, family, root)


def grouped(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries of one parameter together."""
    group: list[Entry] = []
    for entry in entries:
        if group and entry.path != group[0].path:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _named(entries: list[Entry], family: Family, root: str) -> list[Entry]:
    name = family.tensor_name
    return [dataclasses.replace(each, name=root + name(each.name)) for each in entries]


def _block(path: str, block: Any, prefix: str) -> Iterator[Entry]:
    norms = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
    if isinstance(block, ShortcutBlock):
        for nth in range(2):
            for norm, theirs in norms:
                scale = getattr(block, f"{norm}s")[nth].scale
                yield Entry(f"{path}{norm}s.{nth}.scale", f"{prefix}{theirs}.{nth}.weight", scale)
            own = f"{path}attentions.{nth}.", f"{prefix}self_attn.{nth}."
            yield from attention_table(block.attentions[nth], *own)
            yield from _mlp(f"{path}mlps.{nth}.", block.mlps[nth], f"{prefix}mlps.{nth}.")
        yield from _mixture(f"{path}mlp.", block.mlp, f"{prefix}mlp.")
        return
    for norm, theirs in norms:
        yield Entry(f"{path}{norm}.scale", f"{prefix}{theirs}.weight", getattr(block, norm).scale)
    yield from attention_table(block.attention, f"{path}attention.", f"{prefix}self_attn.")
    if isinstance(block.mlp, MixtureOfExperts):
        yield from _mixture(f"{path}mlp.", block.mlp, f"{prefix}mlp.")
    else:
        yield from _mlp(f"{path}mlp.", block.mlp, f"{prefix}mlp.")


def _mixture(path: str, mlp: MixtureOfExperts, prefix: str) -> Iterator[Entry]:
    router = mlp.router
    yield Entry(f"{path}router.kernel", f"{prefix}gate.weight", router.kernel, inputs=1)
    if getattr(router, "bias", None) is not None:
        yield Entry(f"{path}router.bias", f"{prefix}gate.e_score_correction_bias", router.bias)
    for kernel in _MLP:
        parameter = getattr(mlp, kernel)
        stored = isinstance(parameter, Quantised)
        for expert in range((parameter.values if stored else parameter).shape[0]):
            name = f"{prefix}experts.{expert}.{kernel}.weight"
            if stored:
                yield Kept(path + kernel, name, parameter, index=expert)
            else:
                yield Entry(path + kernel, name, parameter, index=expert, inputs=1)
    if mlp.shared is not None:
        yield from _mlp(f"{path}shared.", mlp.shared, f"{prefix}shared_experts.")


def _mlp(path: str, mlp: Any, prefix: str) -> Iterator[Entry]:
    for kernel in _MLP:
        yield _linear(path + kernel, f"{prefix}{kernel}.weight", getattr(mlp, kernel), 1)


def _linear(path: str, name: str, module: Any, inputs: int) -> Entry:
    """The entry of a linear map, of a kernel or of what is kept as it was stored."""
    if isinstance(module, Quantised):
        return Kept(path, name, module)
    return Entry(f"{path}.kernel", name, module.kernel, inputs=inputs)
