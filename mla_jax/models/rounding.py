"""Weights rounded to a form in which checkpoints store them: to try and to measure without one.

Letters: M rows, K columns (torch's [out, in]), E experts.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.layers.projection import Projection
from mla_jax.layers.quantised import Quantised, letters_of
from mla_jax.ops.weights import Weight

# Rows and columns that share a scale, and the largest number, of every form.
FORMS: dict[str, tuple[tuple[int | None, int | None], float]] = {
    "float8_e4m3fn": ((128, 128), 448.0),
    "int8": ((1, None), 127.0),
    "int4": ((1, 32), 7.0),
}
_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def rounded(numbers: Float[Array, "*E M K"], form: str) -> Weight:
    """The nearest numbers of a form, each block scaled so that its largest one is the form's.

    Args:
        numbers: of any float dtype.
        form: "float8_e4m3fn" in blocks of 128 x 128, "int8" by rows or "int4" by 32 of a row.

    Raises:
        ValueError: a form that there is not.

    >>> rounded(jnp.array([[1.0, -127.0]]), "int8").values
    Array([[   1, -127]], dtype=int8)
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: it must be one of {', '.join(FORMS)}.")
    (step, width), largest = FORMS[form]
    *lead, rows, columns = numbers.shape
    step, width_ = step or rows, width or columns
    counts = -(-rows // step), -(-columns // width_)
    padding = [(0, 0)] * len(lead) + [
        (0, count * size - own)
        for count, size, own in zip(counts, (step, width_), (rows, columns), strict=True)
    ]
    cut = jnp.pad(numbers.astype(jnp.float32), padding)
    cut = cut.reshape(*lead, counts[0], step, counts[1], width_)
    scale = jnp.abs(cut).max((-3, -1), keepdims=True) / largest
    scale = jnp.where(scale > 0, scale, 1)
    values = (cut / scale).reshape(*lead, counts[0] * step, counts[1] * width_)
    values = values[..., :rows, :columns]
    values = values if form.startswith("float") else jnp.round(values)
    return Weight(
        values.astype(jnp.dtype(form)), scale[..., :, 0, :, 0], (FORMS[form][0][0], width)
    )


def round_weights(module: nnx.Module, form: str) -> None:
    """Puts a `Quantised` in the place of every linear map and of the experts within a module.

    The router and norms stay as they are, as checkpoints have them.
    """
    for _, parent in list(nnx.iter_modules(module)):
        if isinstance(parent, MixtureOfExperts):
            for name in _EXPERTS:
                kernel = getattr(parent, name)
                types = {"dtype": parent.dtype, "precision": parent.precision}
                weight = rounded(jnp.swapaxes(kernel[...], 1, 2), form)
                setattr(parent, name, Quantised(weight, letters=letters_of(kernel), **types))
        for name, child in list(vars(parent).items()):
            if isinstance(child, nnx.Linear | Projection):
                setattr(parent, name, _of_linear(child, form))


def _of_linear(linear: Any, form: str) -> Quantised:
    kernel = linear.kernel[...]
    inputs = linear.in_features
    inputs = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    weight = rounded(kernel.reshape(math.prod(inputs), -1).T, form)
    return Quantised(
        weight, bias=linear.bias, dtype=linear.dtype, precision=linear.precision,
        letters=letters_of(linear.kernel, len(inputs)),
    )  # fmt: skip
