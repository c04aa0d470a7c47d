"""What `mla-jax demo` trains with: bytes of Python's standard library, AdamW, one jitted step.

Letters: B batch, T tokens.
"""

import functools
import math
import pathlib
import sysconfig
from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.plain import Ready


def standard_library_text(megabytes: float = 4.0) -> np.ndarray:
    """The first `megabytes` of the standard library's own sources, file by file, as uint8.

    The same on every run with the same Python.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    wanted, parts, total = int(megabytes * 1e6), [], 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" in path.parts or total >= wanted:
            continue
        parts.append(path.read_bytes())
        total += len(parts[-1])
    if not parts:
        raise FileNotFoundError(f"no Python sources in {folder}.")
    return np.frombuffer(b"\n".join(parts)[:wanted], np.uint8)


def loss_bits(model, tokens: Int[Ready, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of every next token, in bits."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
    return losses.mean() / math.log(2)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "state"))
def _train_step(graphdef, params, rest, state, tokens, optimizer):
    def loss(params):
        return loss_bits(nnx.merge(graphdef, params, rest), tokens)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


@functools.cache  # one object for equal arguments, of which `_train_step` is compiled once
def _optimizer(steps: int, learning_rate: float, done: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), max(2, steps), learning_rate / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda step: schedule(step + done), b2=0.98, weight_decay=0.05),
    )


def train(
    model: nnx.Module,
    text: np.ndarray,
    *,
    steps: int,
    batch: int = 16,
    length: int = 128,
    learning_rate: float = 6e-3,
    seed: int = 0,
    done: int = 0,
) -> Generator[float]:
    """Trains `model` in place on windows of `text`; yields the loss in bits per byte of each step.

    The model has the trained parameters once the iterator is exhausted, or closed before its end.

    Args:
        model: maps tokens [B T] to logits [B T W].
        text: uint8, one long text.
        steps: optimizer steps; the learning rate warms up over a tenth of them, then follows a
            cosine down to a tenth.
        batch: B, windows of a step.
        length: T, predicted bytes of a window.
        learning_rate: at its peak.
        seed: of the windows.
        done: steps that a training which was interrupted has behind it: windows and learning rate
            go on where they were, the optimizer's moments begin anew.
    """
    if len(text) <= length + 1:
        raise ValueError(
            f"text has {len(text)} bytes: it must have more than length+1={length + 1}."
        )
    optimizer = _optimizer(steps, learning_rate, done)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # the rest does not train
    params = jax.tree.map(jnp.copy, params)  # donated below: the model's own stay valid
    state = optimizer.init(params)
    random = np.random.default_rng(seed)
    window = np.arange(length + 1)[None]
    for step in range(steps):
        starts = random.integers(0, len(text) - length - 1, batch)
        if step < done:
            continue
        tokens = text[starts[:, None] + window].astype(np.int32)
        params, state, value = _train_step(graphdef, params, rest, state, tokens, optimizer)
        try:
            yield float(value)
        except GeneratorExit:  # closed before the end
            nnx.update(model, params)
            raise
    nnx.update(model, params)


def held_out_loss(
    model: nnx.Module, text: np.ndarray, *, length: int = 128, batch: int = 16
) -> float:
    """Loss in bits per byte on the last `batch` windows of `text`, which should be held out."""
    tail = text[-batch * (length + 1) :].reshape(batch, length + 1).astype(np.int32)
    return float(jax.jit(loss_bits)(model, tail))
