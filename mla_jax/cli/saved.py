"""Where the demo's models are: Hugging Face folders, with a note of how far the training is."""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp

from mla_jax import checkpoint
from mla_jax.models import Decoder
from mla_jax.ops.dispatch import Implementation

_TRAINING = "training.json"


def save(model: Decoder, folder: str | os.PathLike) -> None:
    """Writes a model to `folder`: see `checkpoint.save_decoder`."""
    checkpoint.save_decoder(model, folder)


def load(folder: str | os.PathLike, implementation: Implementation = None) -> Decoder:
    """Reads a model that `save` wrote, in float32, as it was trained.

    Raises:
        FileNotFoundError: no model in `folder`.
    """
    if not (pathlib.Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model that `mla-jax demo --save` wrote.")
    return checkpoint.load_decoder(folder, dtype=jnp.float32, implementation=implementation)


def save_training(folder: str | os.PathLike, *, done: int, steps: int) -> None:
    """Notes beside a saved model how many of its training's steps are done."""
    _write_json(pathlib.Path(folder) / _TRAINING, {"done": done, "steps": steps})


def load_training(folder: str | os.PathLike) -> tuple[int, int]:
    """Steps done and steps meant of a saved model's training; (0, 0) where nothing is noted."""
    file = pathlib.Path(folder) / _TRAINING
    if not file.is_file():
        return 0, 0
    noted = json.loads(file.read_text(encoding="utf-8"))
    return noted["done"], noted["steps"]


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes beside and renames: a process that ends meanwhile leaves the old file."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(value, indent=2), encoding="utf-8")
    beside.replace(file)
