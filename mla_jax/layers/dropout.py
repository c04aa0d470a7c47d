"""Dropout of attention weights: where its randomness comes from."""

from typing import Any

from flax import nnx
from jaxtyping import Array


def dropout_key(layer: Any, deterministic: bool | None, rngs: Any) -> Array | None:
    """The key of one call's dropout; None where nothing is dropped.

    Args:
        layer: has `dropout_rate`, `deterministic` and `implementation`.
        deterministic: of the call; None is the layer's.
        rngs: an `nnx.Rngs`, its stream, or a key.

    Raises:
        ValueError: no rngs where they are needed.
        NotImplementedError: a backend is named, of which none has dropout.
    """
    deterministic = layer.deterministic if deterministic is None else deterministic
    if layer.dropout_rate == 0 or deterministic:
        return None
    if rngs is None:
        raise ValueError(
            f"rngs=None: dropout_rate={layer.dropout_rate} without deterministic=True needs them, "
            "as in layer(x, rngs=nnx.Rngs(dropout=0)); or call model.eval()."
        )
    if layer.implementation is not None:
        raise NotImplementedError(
            f"implementation={layer.implementation!r} has no dropout of attention weights, and no "
            "other has: leave it None, or dropout_rate 0."
        )
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    return rngs() if callable(rngs) else rngs
