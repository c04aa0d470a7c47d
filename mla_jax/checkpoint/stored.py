"""One weight as its file holds it, and its numbers: any part of them, dequantised as it is read.

    kind     tensors of a module                         a number is
    plain    weight                                      as it stands
    fp8      weight, weight_scale(_inv)                  value * scale
    int8     weight, weight_scale(_inv)                  value * scale
    packed   weight_packed, weight_scale, weight_shape   (nibble - 8) * scale, bytes less 128

Sources: DeepSeek-V3's fp8 (its weight_scale_inv is a factor), SGLang's int8 per row and per block,
compressed-tensors' pack_to_int32. Scales are float32, bfloat16 or float16; those of fp8 also powers
of two by their exponents (e8m0, or the same in uint8).

Letters: M rows, K columns (torch's [out, in]).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mla_jax.checkpoint import scheme as schemes
from mla_jax.checkpoint.scheme import Form

# What the scale of a weight may be called: the weight's name, less "weight", and one of these.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
# Scales of activations: they change no weight, and stand beside weights that have scales.
_ACTIVATIONS = ("qscale_act", "input_scale", "activation_scale")
# Buffers that the config determines.
BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
_CHUNK = 2**20  # numbers dequantised at once


class Source(Protocol):
    """Where tensors are: a checkpoint's files, or a mapping."""

    def __contains__(self, name: str) -> bool: ...

    def raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        ...

    def where(self, name: str) -> str:
        """What to call a tensor in an error: its name and file."""
        ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in its stored form.

    Attributes:
        names: of all tensors that it is made of; the first holds the values.
        values: as stored: a view of the file.
        shape: of the numbers.
        scale: of every block [M/rows K/columns], as stored; None where the values are the numbers.
        form: kind and blocks; None where the values are the numbers.

    >>> import tempfile
    >>> from mla_jax import checkpoint
    >>> values, scale = np.array([[2, -3]], np.int8), np.array([[0.5]], np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save_tensors(folder, {"up.weight": values, "up.weight_scale": scale})
    ...     held = checkpoint.Checkpoint(folder).stored("up.weight")
    >>> held.values, held.read()
    (array([[ 2, -3]], dtype=int8), array([[ 1. , -1.5]], dtype=float32))
    """

    names: tuple[str, ...]
    values: np.ndarray
    shape: tuple[int, ...]
    scale: np.ndarray | None = None
    form: Form | None = None

    def read(self, index: Any = ..., dtype=None) -> np.ndarray:
        """The numbers at an index, and only those: all by default.

        Args:
            index: integers and slices, as numpy's.
            dtype: to cast to; None keeps a plain tensor's, and gives float32 where scales apply.

        Returns:
            a read-only view of the file where nothing had to be computed, else an array.

        >>> weight = Stored(("w",), np.arange(6.0).reshape(2, 3), (2, 3))
        >>> weight.read((slice(None), 1))
        array([1., 4.])
        """
        if self.form is None:
            value = np.asarray(self.values[index])  # numpy gives a scalar for a single number
            return value if dtype is None or value.dtype == dtype else value.astype(dtype)
        bounds, inside = _bounds(index, self.shape)
        out = np.empty([b.stop - b.start for b in bounds], np.dtype(dtype or np.float32))
        for rows in self.chunks(bounds[0], bounds[1]):
            first = rows.start - bounds[0].start
            out[first : first + rows.stop - rows.start] = self._dequantized(rows, bounds[1])
        return np.asarray(out[inside])

    def unscaled(self, index: Any = ...) -> np.ndarray:
        """The values at an index in their own small type, packed ones unpacked.

        >>> form = Form(np.dtype(np.int8), (1, None))
        >>> Stored(("w",), np.array([[2, -3]], np.int8), (1, 2), np.ones((1, 1)), form).unscaled()
        array([[ 2, -3]], dtype=int8)
        """
        if self.form is None or self.form.dtype != schemes.INT32:
            return self.values[index]
        bounds, inside = _bounds(index, self.shape)
        dtype = ml_dtypes.int4 if self.form.bits == 4 else np.int8
        return _unpacked(self.values, self.form.bits, *bounds).astype(dtype)[inside]

    def chunks(self, rows: slice, columns: slice) -> list[slice]:
        """Rows in parts of a few megabytes, whole blocks where that is possible."""
        width = max(1, columns.stop - columns.start)
        block = (self.form.block[0] if self.form else None) or 1
        step = max(1, _CHUNK // width)
        if block * width <= 8 * _CHUNK:
            step = max(block, step // block * block)
        edges = [rows.start, *range((rows.start // step + 1) * step, rows.stop, step), rows.stop]
        return list(itertools.starmap(slice, itertools.pairwise(edges)))

    def _dequantized(self, rows: slice, columns: slice) -> np.ndarray:
        assert self.form is not None
        assert self.scale is not None
        if self.form.dtype == schemes.INT32:
            value = _unpacked(self.values, self.form.bits, rows, columns)
        else:
            value = self.values[rows, columns]
        factors = self.scale
        for axis, part in enumerate((rows, columns)):
            step = self.form.block[axis] or self.shape[axis] or 1
            first, last = part.start // step, -(-part.stop // step)
            factors = factors[first:last] if axis == 0 else factors[:, first:last]
            if axis == 0:
                factors = factors.astype(np.float32)
            if factors.shape[axis] > 1 and step > 1:
                factors = np.repeat(factors, step, axis=axis)
                skip = part.start - first * step
                kept = slice(skip, skip + part.stop - part.start)
                factors = factors[kept] if axis == 0 else factors[:, kept]
        return value.astype(np.float32) * factors


def stored(name: str, source: Source, allowed: tuple[Form, ...] | None) -> Stored:
    """The stored form of a tensor.

    Args:
        name: its full name, such as "model.layers.0.mlp.up_proj.weight", also where it is packed.
        source: where the tensors are.
        allowed: what `scheme.forms` gives.

    Raises:
        KeyError: no such tensor.
        ValueError: numbers that need scales that are not there, or scales that do not fit; the
            message names key and file.
    """
    stem = name.removesuffix("weight")
    packed = f"{stem}weight_packed"
    if name not in source and stem != name and packed in source:
        return _packed(name, stem, source, allowed)
    value = source.raw(name)
    scaled = value.dtype in (schemes.E4M3, schemes.E5M2, schemes.INT8)
    if not scaled:
        if value.dtype not in _FLOATS:
            raise ValueError(
                f"{source.where(name)} holds {value.dtype}: a weight is float, fp8 or int8 with "
                "scales, or compressed-tensors' packed integers."
            )
        return Stored((name,), value, value.shape)
    found = [stem + suffix for suffix in SCALES if stem != name and stem + suffix in source]
    if not found:
        kind = "int8" if value.dtype == schemes.INT8 else "fp8"
        raise ValueError(
            f"{source.where(name)} is {kind} and has no scale: looked for "
            f"{stem}{{{', '.join(SCALES)}}} in all files."
        )
    announced = schemes.undeclared() if allowed is None else allowed
    forms = [form for form in announced if form.dtype == value.dtype]
    if not forms:
        raise ValueError(
            f"{source.where(name)} holds {value.dtype}, which its quantization_config does not "
            "announce."
        )
    scale = source.raw(found[0])
    if scale.dtype in (np.uint8, _E8M0) and forms[0].exponents:
        scale = scale.view(_E8M0)
    elif scale.dtype not in _FLOATS:
        raise ValueError(
            f"{source.where(found[0])} holds {scale.dtype}: scales of {name} are floats, or "
            "exponents where quantization_config has scale_fmt='ue8m0'."
        )
    form, scale = _fitting(name, value.shape, found[0], scale, forms, source)
    return Stored((name, found[0]), value, value.shape, scale, form)


def beside(name: str, source: Source) -> str | None:
    """The weight to which a tensor belongs that is no weight; None where it belongs to none.

    These are scales of activations and rotary buffers: they may stay unused.
    """
    head, _, last = name.rpartition(".")
    weight = f"{head}.weight"
    if last in _ACTIVATIONS and any(f"{head}.{suffix}" in source for suffix in SCALES):
        packed = f"{head}.weight_packed"
        return weight if weight in source else packed if packed in source else None
    return None


def _packed(name: str, stem: str, source: Source, allowed: tuple[Form, ...] | None) -> Stored:
    packed, scale_name, shape_name = (
        stem + last for last in ("weight_packed", "weight_scale", "weight_shape")
    )
    value = source.raw(packed)
    forms = [form for form in allowed or () if form.dtype == schemes.INT32]
    if value.dtype != schemes.INT32 or not forms:
        raise ValueError(
            f"{source.where(packed)} holds {value.dtype}: packed weights are read where they are "
            "int32 and quantization_config announces pack-quantized."
        )
    for needed in (scale_name, shape_name):
        if needed not in source:
            raise ValueError(f"{source.where(packed)} is packed and {needed} is missing.")
    sizes = source.raw(shape_name)
    if sizes.shape != (2,) or not np.issubdtype(sizes.dtype, np.integer) or (sizes < 1).any():
        raise ValueError(f"{source.where(shape_name)} must be two positive whole numbers.")
    shape = (int(sizes[0]), int(sizes[1]))
    forms = [f for f in forms if value.shape == (shape[0], -(-shape[1] * f.bits // 32))]
    if not forms:
        raise ValueError(
            f"{source.where(packed)} has shape {value.shape}, which does not hold the {shape} "
            f"numbers that {shape_name} announces."
        )
    scale = source.raw(scale_name)
    if scale.dtype not in _FLOATS:
        raise ValueError(f"{source.where(scale_name)} holds {scale.dtype}: no scales of {name}.")
    form, scale = _fitting(name, shape, scale_name, scale, forms, source)
    return Stored((packed, scale_name, shape_name), value, shape, scale, form)


def _fitting(name, shape, scale_name, scale, forms, source) -> tuple[Form, np.ndarray]:
    """The form whose scales have this shape, and the scales as a grid."""
    if len(shape) == 2:
        for form in forms:
            grid = form.grid(shape)
            flat = scale.shape in ((grid[0],), grid) if grid[1] == 1 else scale.shape == grid
            if flat or (grid == (1, 1) and scale.size == 1):
                return form, scale.reshape(grid)
    grids = " or ".join(str(form.grid(shape)) for form in forms) if len(shape) == 2 else "none"
    raise ValueError(
        f"{source.where(scale_name)} has shape {scale.shape}: {name} of shape {tuple(shape)} in "
        f"blocks of {' or '.join(str(form.block) for form in forms)} needs {grids}."
    )


def _unpacked(words: np.ndarray, bits: int, rows: slice, columns: slice) -> np.ndarray:
    """Numbers from int32 words, the first in the lowest bits; they were stored unsigned."""
    each = 32 // bits
    first = columns.start // each
    part = words[rows, first : -(-columns.stop // each)]
    numbers = np.ascontiguousarray(part).view(np.uint8)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(len(part), -1)
    skip = columns.start - first * each
    numbers = numbers[:, skip : skip + columns.stop - columns.start]
    return numbers.astype(np.int16) - 2 ** (bits - 1)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[list[slice], tuple]:
    """Slices that hold an index, and the index into what they hold."""
    given = index if isinstance(index, tuple) else (index,)
    if ... in given:
        at = given.index(...)
        missing = len(shape) - len(given) + 1
        given = (*given[:at], *(slice(None),) * missing, *given[at + 1 :])
    given += (slice(None),) * (len(shape) - len(given))
    bounds, inside = [], []
    for i, size in zip(given, shape, strict=True):
        if isinstance(i, slice):
            start, stop, step = i.indices(size)
            count = len(range(start, stop, step))
            low = min(start, start + (count - 1) * step) if count else start
            high = max(start, start + (count - 1) * step) + 1 if count else start
            bounds.append(slice(low, high))
            inside.append(slice(None) if step == 1 else slice(None, None, step))
        else:
            at = range(size)[i]
            bounds.append(slice(at, at + 1))
            inside.append(0)
    return bounds, tuple(inside)


class Arrays:
    """A `Source` of tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def raw(self, name: str) -> np.ndarray:
        """A tensor: numpy's view of it, for jax would round a float64 or copy it to a device."""
        return np.asarray(self.tensors[name])

    def where(self, name: str) -> str:
        """Its name: it has no file."""
        return name
