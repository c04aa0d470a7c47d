"""A whole decoder from and to a Hugging Face folder: every tensor used, or refused by its name.

Layer by layer, each parameter placed as soon as it is read. The block for multi-token prediction
follows the layers under the next number, and is read where it is asked for.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax import families
from mla_jax.checkpoint import saving
from mla_jax.checkpoint.attention import read
from mla_jax.checkpoint.files import Checkpoint
from mla_jax.checkpoint.gate import refuse_unused
from mla_jax.checkpoint.host import Shardings, sharding_of
from mla_jax.checkpoint.kept import keep
from mla_jax.checkpoint.scheme import QUANTIZATION
from mla_jax.checkpoint.stored import Stored
from mla_jax.checkpoint.tensors import (
    Entry,
    decoder_table,
    grouped,
    head_entry,
    predictor_copies,
    predictor_table,
)
from mla_jax.models.config import DecoderConfig
from mla_jax.models.decoder import Decoder
from mla_jax.ops import dense, dispatch
from mla_jax.sharding import metadata

_COMPARED = 2**24  # bytes at once
# What is no linear map of a layer, and has the parameters' dtype however it is stored.
_DENSE = {"embed", "head", "router", "indexer"}


def load_decoder(
    path: str | os.PathLike,
    *,
    mtp: bool = False,
    dtype=jnp.bfloat16,
    param_dtype=None,
    weights=None,
    precision=None,
    implementation: dispatch.Implementation = None,
    sharding: Shardings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Reads a model of DeepSeek's shape: its config.json and its safetensors.

    Quantised weights (fp8 and int8 per tensor, row or block, and compressed-tensors' packed
    integers) are multiplied by their scales as they are read, or with weights="as stored" when they
    are used: then linear maps and experts take the bytes that they take in the file, and have no
    derivative. Every tensor of the language model is used,
    or refused. Left alone are: the family's vision tower, rotary buffers, scales of quantised
    activations, and blocks for drafting that nobody asked for.

    Args:
        path: a folder, or a repo id (see `resolve`).
        mtp: read the block for multi-token prediction too, the model's `predictor`. Its copies of
            the embedding and the head are not kept where they equal the model's, as usual.
        dtype: of the computation.
        param_dtype: of the parameters; None is `dtype`. The router's stay float32.
        weights: "as stored", or a dtype, which is the same as param_dtype.
        precision, implementation: as in `MultiHeadLatentAttention`.
        sharding: as in `load_attention`; paths begin with "blocks.3.attention." and the like. Every
            process makes the same call.
        on_progress: called as parts are read, with how many there are by now and of how many.

    Raises:
        ValueError: weights that are neither, or another dtype than param_dtype; a config that is
            not of this shape; tensors missing, left over, or of another shape; a scheme of
            quantisation that is not read; mtp where there is no such block. The message names key
            and file.
        FileNotFoundError: no such folder or file.

    Warns:
        UserWarning: a config that ties head and embedding beside a head that differs from it: the
            head is used.

    >>> import jax.numpy as jnp, mla_jax
    >>> model = load_decoder("DeepSeek-V2-Lite")  # doctest: +SKIP
    >>> model(jnp.array([[1, 2, 3]])).shape  # doctest: +SKIP
    (1, 3, 102400)
    """
    as_stored = isinstance(weights, str) and weights == "as stored"
    if weights is not None and not as_stored:
        if param_dtype is not None:
            raise ValueError(f"weights={weights!r}: param_dtype={param_dtype!r} says it already.")
        try:
            param_dtype = np.dtype(weights)
        except TypeError as error:
            raise ValueError(f"weights={weights!r}: it must be 'as stored' or a dtype.") from error
    with Checkpoint(path) as files:
        config = decoder_config(files)
        files.check_beside()
        loader = _Loader(files, config, sharding, as_stored)
        try:
            model = nnx.eval_shape(
                lambda: Decoder(
                    loader.config, mtp=mtp, dtype=dtype, param_dtype=param_dtype or dtype,
                    precision=precision, implementation=implementation, rngs=nnx.Rngs(0),
                )
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{files.path}: {error}") from error
        loader.load(model, on_progress or (lambda done, total: None))
    return model


def save_decoder(
    model: Decoder, folder: str | os.PathLike, *, max_shard_bytes: float = 5e9
) -> None:
    """Writes a model as a Hugging Face folder: config.json, safetensors and their index.

    `load_decoder` reads it back bit for bit, and so does the family's own code: tensors have its
    names and order, each in its parameter's dtype, or as they were stored where they were kept so.
    A folder may be saved over, also while a model is read from it: until one rename at the end it
    is the old model, and then the new one. Where several processes hold the model together, each
    makes the same call and the first one writes.

    Args:
        model: the model; with its block for multi-token prediction where it has one.
        folder: made where it is not there. Files that are no model's, such as a tokenizer's, stay.
        max_shard_bytes: a new file starts before one would grow beyond this.

    Raises:
        ValueError: a config that its family's config.json cannot say; the message names the field.
        OSError: the disk is full, or the like. The folder is then what it was.

    >>> import tempfile, jax.numpy as jnp
    >>> from flax import nnx
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_decoder(model, folder)
    ...     same = load_decoder(folder, dtype=jnp.float32)
    >>> bool((same.embed.embedding[...] == model.embed.embedding[...]).all())
    True
    """
    config = model.config.replace(tie_word_embeddings=model.head is None)
    if model.predictor is None:
        config = config.replace(num_nextn_predict_layers=0)
    hf = families.config_json(config, str(np.dtype(model.embed.embedding.dtype)))
    back = DecoderConfig.from_hf(hf)
    for name in ("attention", *(field for field in vars(config) if field != "model_type")):
        if getattr(back, name) != getattr(config, name):
            raise ValueError(
                f"config.json of model_type={hf['model_type']!r} cannot say "
                f"{name}={getattr(config, name)!r}."
            )
    family = families.FAMILIES[hf["model_type"]]
    entries = decoder_table(model, family)
    head = head_entry(model, family.tensor_name("lm_head") + ".weight")
    entries += [] if head is None else [head]
    if model.predictor is not None:
        entries += predictor_table(model, family) + predictor_copies(model, family)
    tensors = [tensor for entry in entries for tensor in entry.tensors()]
    if model.quantization is not None:
        hf |= json.loads(model.quantization)
    together = any(entry.spans for entry in entries)
    saving.write(folder, tensors, shard_bytes=max_shard_bytes, config=hf, together=together)


def decoder_config(files: Checkpoint) -> DecoderConfig:
    """The config of a checkpoint.

    Raises:
        FileNotFoundError: it has none.
        ValueError: as `DecoderConfig.from_hf`; the message names the checkpoint.
    """
    if not files.config:
        raise FileNotFoundError(f"{files.path} has no config.json, which says what model it is.")
    try:
        return DecoderConfig.from_hf(files.config)
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from error


def _quantization(config: Mapping[str, Any]) -> str | None:
    """What a config.json says of stored forms, as JSON; None where it says nothing."""
    for part in (families.language_model(config), config):
        found = {key: part[key] for key in QUANTIZATION if part.get(key) is not None}
        if found:
            return json.dumps(found)
    return None


class _Loader:
    """One checkpoint on its way into one model."""

    def __init__(
        self, files: Checkpoint, config: DecoderConfig, sharding: Shardings | None, keep: bool
    ):
        self.files, self.sharding, self.keep = files, sharding, keep
        self.family, self.whole = families.of_checkpoint(files.config, str(files.path))
        self.used: set[str] = set()
        self._ahead: set[str] = set()  # layers that are being read ahead
        self._elsewhere: set[str] = set()  # modules of which other processes hold a part
        self.root = files.root(self.family.tensor_name("layers"))
        head = self.family.tensor_name("lm_head") + ".weight"
        # beside the root: "lm_head.weight", in a VLM "language_model.lm_head.weight", or above
        beside = f"{self.root.removesuffix('model.')}{head}"
        self.head = beside if self._has(beside) else head
        self.embed = f"{self.root}{self.family.tensor_name('embed_tokens')}.weight"
        self.config = config
        if config.tie_word_embeddings and self._has(self.head):
            self._untie()

    def load(self, model: Decoder, on_progress: Callable[[int, int], None]) -> None:
        """Fills the model."""
        table = decoder_table(model, self.family, self.root)
        head = head_entry(model, self.head)
        groups = list(grouped(table if head is None else [*table, head]))
        for group in groups:
            self._elsewhere |= {entry.name.rpartition(".")[0] for entry in self._not_all(group)}
        for done, group in enumerate(groups):
            on_progress(done, len(groups))
            self._fill(group, model)
        on_progress(len(groups), len(groups))
        if model.predictor is not None:
            self._predictor(model)
        refuse_unused(
            self.files, self.used, family=self.family, whole=self.whole, root=self.root,
            config=self.config, drafts=model.predictor is not None,
        )  # fmt: skip

    def _has(self, name: str) -> bool:
        return name in self.files or f"{name.removesuffix('weight')}weight_packed" in self.files

    def _untie(self) -> None:
        """Uses a head that a tied model's checkpoint has, where it is not the embedding."""
        if not self._differs(self.head, self.embed):
            return
        warnings.warn(
            f"{self.files.where(self.head)} is not the embedding, though tie_word_embeddings is "
            "true: the head is used, untied.",
            stacklevel=4,
        )
        self.config = self.config.replace(tie_word_embeddings=False)

    def _predictor(self, model: Decoder) -> None:
        predictor = model.predictor
        assert predictor is not None
        number = self.config.attention.num_hidden_layers
        prefix = f"{self.root}{self.family.tensor_name('layers')}.{number}."
        if not any(name.startswith(prefix) for name in self.files):
            raise ValueError(
                f"{self.files.path} has nothing under {prefix}, where its config "
                f"(num_nextn_predict_layers={self.config.num_nextn_predict_layers}) puts the block "
                "for multi-token prediction; without mtp, draft by prompt lookup."
            )
        for group in grouped(predictor_table(model, self.family, self.root)):
            self._fill(group, model)
        embed = model.embed
        types: dict[str, Any] = {"dtype": embed.dtype, "param_dtype": embed.param_dtype}
        words, width = self.config.vocab_size, self.config.attention.hidden_size
        words_of, head = predictor_copies(model, self.family, self.root)
        if self._has(words_of.name) and self._differs(words_of.name, self.embed):
            predictor.embed = nnx.eval_shape(
                lambda: nnx.Embed(
                    words, width, embedding_metadata=metadata("W", "D"), rngs=nnx.Rngs(0), **types
                )
            )
        shared = self.embed if model.head is None else self.head
        if self._has(head.name) and self._differs(head.name, shared):
            types |= {"use_bias": False, "precision": predictor.eh_proj.precision}
            types |= dense.linear("D", "W", plain=True)
            predictor.head = nnx.eval_shape(
                lambda: nnx.Linear(width, words, rngs=nnx.Rngs(0), **types)
            )
        own = {"predictor.embed": predictor.embed, "predictor.head": predictor.head}
        for entry in predictor_copies(model, self.family, self.root):
            if own[entry.path.rpartition(".")[0]] is not None:
                self._fill([entry], model)

    def _differs(self, name: str, shared: str) -> bool:
        """Whether a tensor is not a copy of another, which is used."""
        copy, own = self._stored(name), self._stored(shared)
        if copy.shape != own.shape:
            raise ValueError(
                f"{self.files.where(name)} has shape {copy.shape}: {shared} has {own.shape}."
            )
        self.used |= {*copy.names}
        step = max(1, _COMPARED // max(1, 4 * copy.shape[-1]))
        for start in range(0, copy.shape[0], step):
            rows = slice(start, start + step)
            same = np.array_equal(
                copy.read(rows, np.float32), own.read(rows, np.float32), equal_nan=True
            )
            self.files.release()
            if not same:
                return True
        return False

    def _stored(self, name: str) -> Stored:
        if not self._has(name):
            raise ValueError(f"{self.files.path} lacks {name}, which its config asks for.")
        return self.files.stored(name)

    def _fill(self, entries: list[Entry], model: Decoder) -> None:
        """One parameter."""
        entry = entries[0]
        self._prefetch(entry)
        goal = sharding_of(self.sharding, entry.path, entry.parameter)

        def get(name):
            found = self._stored(name)
            self.used.update(found.names)
            return found

        if self.keep and not _DENSE & set(entry.path.split(".")):
            parts = [get(each.name) for each in entries]
            if any(part.form is not None for part in parts):
                where = self.files.where
                keep(model, entries, parts, self.files.raw, where, self.sharding)
                model.quantization = model.quantization or _quantization(self.files.config)
                self.files.release()
                return
        entry.parameter.set_value(read(entries, get, self.files.where, goal))
        self.files.release()

    def _not_all(self, group: list[Entry]) -> list[Entry]:
        """The entries of a parameter of which this process does not hold all."""
        entry = group[0]
        goal = sharding_of(self.sharding, entry.path, entry.parameter)
        if goal is None or goal.is_fully_addressable:
            return []
        held = set()
        for index in goal.addressable_devices_indices_map(entry.parameter.shape).values():
            bounds = zip(index or (), entry.parameter.shape, strict=True)
            held.add(tuple(i.indices(size)[:2] for i, size in bounds))
        if entry.index is None:
            numbers = sum(math.prod(stop - start for start, stop in part) for part in held)
            return [] if numbers == math.prod(entry.parameter.shape) else group
        inside = {at for part in held for at in range(*part[0])}
        return [entry for entry in group if entry.index not in inside]

    def _prefetch(self, entry: Entry) -> None:
        """Reads the rest of this layer and the next one ahead."""
        match = re.match(
            rf"(.*?{re.escape(self.family.tensor_name('layers'))}\.)(\d+)\.", entry.name
        )
        if match is None:
            names = {entry.name, self.embed}
            self.files.prefetch(n for n in self.files if n in names and self._is_here(n))
            return
        if match[0] in self._ahead:
            return
        self._ahead.add(match[0])
        for layer in (int(match[2]), int(match[2]) + 1):
            prefix = f"{match[1]}{layer}."
            names = (name for name in self.files if name.startswith(prefix))
            self.files.prefetch(name for name in names if self._is_here(name))

    def _is_here(self, name: str) -> bool:
        return name.rpartition(".")[0] not in self._elsewhere
