"""Weights that stay as a checkpoint stores them: from files into `Quantised` layers and back.

Letters: M rows, K columns (torch's [out, in]), E experts.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from mla_jax import sharding as shardings
from mla_jax.checkpoint import host, saving
from mla_jax.checkpoint.scheme import INT32
from mla_jax.checkpoint.stored import Stored
from mla_jax.layers.quantised import Frozen, Quantised, letters_of, of_scales
from mla_jax.ops.weights import Weight


class Place(Protocol):
    """What `keep` asks of an entry of a model's table."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def index(self) -> int | None: ...
    @property
    def stored_shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file had a weight: what its bytes are, and its scale.

    Attributes:
        bits: of a number in int32 words; None where the values stand by themselves.
        scale: last part of its name.
        scale_dtype, scale_shape: of the tensor.
        shape_dtype: of what says the shape of packed numbers.
    """

    bits: int | None
    scale: str
    scale_dtype: str
    scale_shape: tuple[int, ...]
    shape_dtype: str | None = None


def written(name: str, module: Quantised, index: int | None) -> Iterator[saving.Tensor]:
    """Values and scale under the names that they had.

    Args:
        name: of the weight, whether or not it is packed.
        module: that holds it.
        index: of the expert; None where there is one matrix.
    """
    layout: Any = module.stored
    stem, shape = name.removesuffix("weight"), module.values.shape[-2:]
    values = lambda: host.fetch(module.values[...], index)  # noqa: E731
    if layout.bits is None:
        yield saving.Tensor(name, np.dtype(module.values.dtype), shape, values)
    else:
        words = (shape[0], -(-shape[1] * layout.bits // 32))
        packed = lambda: _packed(values(), layout.bits)  # noqa: E731
        yield saving.Tensor(f"{stem}weight_packed", INT32, words, packed)
        kind = np.dtype(layout.shape_dtype)
        yield saving.Tensor(f"{stem}weight_shape", kind, (2,), lambda: np.array(shape, kind))

    def scale():
        found = host.fetch(module.scale[...], index)
        exponents = layout.scale_dtype == "uint8"
        dtype = ml_dtypes.float8_e8m0fnu if exponents else jnp.dtype(layout.scale_dtype)
        found = found.astype(dtype).reshape(layout.scale_shape)
        return found.view(np.uint8) if exponents else found

    dtype = np.dtype(jnp.dtype(layout.scale_dtype))
    yield saving.Tensor(stem + layout.scale, dtype, layout.scale_shape, scale)


def keep(
    model: nnx.Module,
    entries: list[Any],
    parts: list[Stored],
    raw: Callable[[str], np.ndarray],
    where: Callable[[str], str],
    sharding: host.Shardings | None,
) -> None:
    """Puts a `Quantised` in the place of the map that these entries would fill.

    Args:
        model: to be changed.
        entries: of one parameter: one, or one for every expert.
        parts: their stored forms.
        raw: a tensor as its file holds it.
        where: what to call a tensor in an error.
        sharding: of values and scales, whose paths end in ".values" and ".scale".

    Raises:
        ValueError: a tensor of another shape, or experts that are not stored alike.
    """
    first, parent, name = entries[0], *_parent(model, entries[0].path.removesuffix(".kernel"))
    layouts = [_layout(part, raw) for part in parts]
    for entry, part, layout in zip(entries, parts, layouts, strict=True):
        if part.shape != entry.stored_shape:
            raise ValueError(
                f"{where(entry.name)} has shape {tuple(part.shape)}: the config asks for "
                f"{entry.stored_shape}."
            )
        if (part.form, layout) != (parts[0].form, layouts[0]):
            raise ValueError(
                f"{where(entry.name)} is stored otherwise than {first.name}: experts of one layer "
                "can be kept as they are stored only where they are stored alike."
            )
    form = parts[0].form
    assert form is not None
    assert parts[0].scale is not None
    lead = () if first.index is None else (len(parts),)
    kinds = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}
    dtype = kinds[form.bits] if form.dtype == INT32 else form.dtype
    path = first.path.removesuffix(".kernel")
    old = getattr(parent, name)
    experts = isinstance(old, nnx.Variable)  # which are arrays of their layer
    inputs = 1 if experts else len(np.atleast_1d(old.in_features))
    letters = letters_of(old if experts else old.kernel, inputs)

    def build(kind, shape, dtype, of):
        whole: Any = jax.ShapeDtypeStruct(lead + shape, dtype)
        own = letters if kind == "values" else of_scales(letters)
        like = Frozen(whole, **shardings.metadata(*own))
        goal = host.sharding_of(sharding, f"{path}.{kind}", like)

        def fill(out, index):
            if not lead:
                out[...] = of(parts[0], index)
                return
            for at in range(index[0].start, index[0].stop):
                out[at - index[0].start] = of(parts[at], index[1:])

        return host.build(lead + shape, dtype, goal, fill)

    values = build("values", parts[0].shape, dtype, lambda part, at: part.unscaled(at))
    scale = build(
        "scale", parts[0].scale.shape, np.dtype(np.float32),
        lambda part, at: part.scale[at].astype(np.float32),
    )  # fmt: skip
    owner = parent if experts else old
    setattr(parent, name, Quantised(
        Weight(values, scale, form.block), bias=getattr(old, "bias", None), dtype=owner.dtype,
        precision=owner.precision, stored=layouts[0], letters=letters,
    ))  # fmt: skip


def _parent(model, path: str) -> tuple[Any, str]:
    *steps, last = path.split(".")
    for step in steps:
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model, last


def _layout(part: Stored, raw) -> Layout | None:
    if part.form is None:
        return None
    scale = raw(part.names[1])
    bits = part.form.bits if part.form.dtype == INT32 else None
    return Layout(
        bits, part.names[1].rpartition(".")[2], scale.dtype.name, scale.shape,
        raw(part.names[2]).dtype.name if bits else None,
    )  # fmt: skip


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Int32 words, the first number in the lowest bits, stored unsigned."""
    each = 32 // bits
    unsigned = values.astype(np.int16) + 2 ** (bits - 1)
    unsigned = np.pad(unsigned, ((0, 0), (0, -values.shape[1] % each))).astype(np.uint8)
    if bits == 4:
        pairs = unsigned.reshape(len(values), -1, 2)
        unsigned = pairs[..., 0] | pairs[..., 1] << 4
    return np.ascontiguousarray(unsigned).view(np.int32)
