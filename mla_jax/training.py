"""Byte-level training of a `Decoder` on the Python standard library's own sources, with optax.

Nothing is downloaded and there is no tokenizer: a token is a byte, the corpus is on every machine
that runs Python, and the same seed gives the same model. Losses are in bits per byte.

Letters: B batch, T tokens.
"""

import functools
import json
import math
import pathlib
import sysconfig
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.models.decoder import Decoder, DecoderConfig
from mla_jax.ops.api import default_device

VOCAB_SIZE = 256
# Installed packages are not the library; tests may be absent; the others are tables, not code.
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
            "encodings", "pydoc_data", "lib2to3"}  # fmt: skip


def standard_library(megabytes: float = 6.0, held_out: float = 0.05) -> tuple[np.ndarray, ...]:
    """The first megabytes of the standard library's sources by path, split in two.

    Args:
        megabytes: of text to take, in millions of bytes.
        held_out: fraction at the end that is kept for evaluation.

    Returns:
        training and evaluation bytes, uint8 arrays.

    Raises:
        FileNotFoundError: this Python comes without its sources.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    limit, parts, size = int(megabytes * 1e6), [], 0
    for path in sorted(folder.rglob("*.py")):
        if size >= limit:
            break
        if _SKIPPED.isdisjoint(path.relative_to(folder).parts):
            parts.append(path.read_bytes())
            size += len(parts[-1])
    if not size:
        raise FileNotFoundError(f"no Python sources in {folder} to train on.")
    text = np.frombuffer(b"".join(parts), np.uint8)[:limit]
    split = len(text) - int(len(text) * held_out)
    return text[:split], text[split:]


def optimizer(model: Decoder, steps: int, learning_rate: float = 4e-3) -> nnx.Optimizer:
    """AdamW with clipped gradients; linear warm-up over a tenth of the steps, then a cosine."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(steps, warmup + 1), end_value=0.02 * learning_rate
    )
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=decayed)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


def bits_per_byte(model: Decoder, tokens: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean cross entropy of every next byte, in bits."""
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean() / math.log(2)


@functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
def train_step(
    model: Decoder, optimizer: nnx.Optimizer, tokens: Int[Array, "B T+1"]
) -> Float[Array, ""]:
    """One update of both, in their own memory; returns the loss before it."""
    loss, grads = nnx.value_and_grad(bits_per_byte)(model, tokens)
    optimizer.update(model, grads)
    return loss


def train(
    model: Decoder,
    text: np.ndarray,
    *,
    steps: int,
    batch: int = 8,
    length: int = 256,
    seed: int = 0,
    learning_rate: float = 4e-3,
) -> Iterator[float]:
    """Trains `model` in place on random windows of `text`; yields each step's loss.

    Args:
        model: with vocab_size 256.
        text: bytes, more than `length`.
        steps: updates.
        batch, length: B and T of a step.
        seed: of the windows.
        learning_rate: its peak.

    Raises:
        ValueError: text too short for one window.
    """
    state, rng = optimizer(model, steps, learning_rate), np.random.default_rng(seed)
    for _ in range(steps):
        yield float(train_step(model, state, _windows(text, rng, batch, length)))


def evaluate(model: Decoder, text: np.ndarray, *, batch: int = 8, length: int = 256) -> float:
    """Bits per byte on the same 4 B windows of `text` every time."""
    rng, loss = np.random.default_rng(0), nnx.jit(bits_per_byte)
    return sum(float(loss(model, _windows(text, rng, batch, length))) for _ in range(4)) / 4


def _windows(text, rng, batch, length):
    if len(text) <= length:
        raise ValueError(f"text has {len(text)} bytes: windows need length + 1 = {length + 1}.")
    starts = rng.integers(0, len(text) - length, (batch, 1))
    return jnp.asarray(text[starts + np.arange(length + 1)], jnp.int32)


def save(model: Decoder, directory: str | pathlib.Path) -> None:
    """Writes config.json and the parameters (orbax) into a folder, over an older checkpoint.

    Raises:
        FileExistsError: the folder holds something that is not such a checkpoint.
    """
    directory = check_save(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "params", _params(model), force=True)
    text = json.dumps(model.config.to_dict(), indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def check_save(directory: str | pathlib.Path) -> pathlib.Path:
    """The absolute path, if `save` may write there; otherwise its FileExistsError."""
    directory = pathlib.Path(directory).expanduser().absolute()
    ours = (directory / "params").is_dir() and (directory / "config.json").is_file()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not ours):
        raise FileExistsError(f"{directory} holds something else than a checkpoint: not replaced.")
    return directory


def load_config(directory: str | pathlib.Path) -> DecoderConfig:
    """The config that `save` wrote.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: its config.json is not one of ours.
    """
    path = pathlib.Path(directory).expanduser().absolute() / "config.json"
    if not path.is_file() or not (path.parent / "params").is_dir():
        raise FileNotFoundError(f"{path.parent} holds no checkpoint (config.json and params/).")
    try:
        return DecoderConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load(directory: str | pathlib.Path, **options) -> Decoder:
    """The model that `save` wrote; options (`dtype`, `implementation`) as of `Decoder`."""
    config = load_config(directory)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    sharding = jax.sharding.SingleDeviceSharding(default_device())
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _params(model),
    )
    path = pathlib.Path(directory).expanduser().absolute() / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(model, checkpointer.restore(path, target))
    return model


def _params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
